"""A made-up ReportData with every part filled: what the tests render."""

import numpy as np

from orchestration.report_data import (
    Curve,
    ModalityCount,
    PrototypeUse,
    Refusal,
    ReportData,
    Samples,
    Score,
    StepTime,
    Views,
)

MODALITIES = ("xr", "ct", "mr", "us")
MEANS = {"pretrained": 0.88, "random": 0.79, "pixels": 0.74}


def picture(seed: int, height: int = 150, width: int = 150) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    body = (x / 0.7) ** 2 + (y / 0.85) ** 2 < 1
    image = body * (110 + 60 * np.sin(6 * x + seed) * np.cos(5 * y - seed)) + rng.normal(0, 6, x.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def curve(n: int = 100) -> Curve:
    rng = np.random.default_rng(0)
    steps = tuple(range(10, 10 * n + 1, 10))
    fall = np.linspace(0, 1, n) ** 0.5
    by = {m: tuple(4.16 - (0.7 + 0.15 * i) * fall + rng.normal(0, 0.03, n)) for i, m in enumerate(MODALITIES)}
    return Curve(steps, tuple(np.mean(list(by.values()), axis=0)), by, float(np.log(64)), 1000)


def scores() -> tuple[Score, ...]:
    rng = np.random.default_rng(1)
    return tuple(
        Score(m, e, p, s, float(MEANS[e] + 0.01 * i + rng.normal(0, 0.008)), 180, 41)
        for i, m in enumerate(MODALITIES)
        for p in ("linear", "knn")
        for e in MEANS
        for s in range(3)
    )


def report_data() -> ReportData:
    rng = np.random.default_rng(2)
    return ReportData(
        generated=True,
        date="2026-11-23",
        counts=tuple(ModalityCount(m, 180 + 7 * i, 22, 24, 60 + i) for i, m in enumerate(MODALITIES)),
        inputs=871,
        refusals=(Refusal("burned_in_risk", 4), Refusal("duplicate", 9), Refusal("unreadable", 2)),
        samples=tuple(
            Samples(m, tuple(picture(20 * i + k) for k in range(12))) for i, m in enumerate(MODALITIES)
        ),
        views=tuple(
            Views(
                m,
                picture(i, 256, 200),
                (
                    np.stack([picture(40 * i + k, 40, 40) for k in range(2)]),
                    np.stack([picture(60 * i + k, 24, 24) for k in range(6)]),
                ),
            )
            for i, m in enumerate(MODALITIES)
        ),
        curve=curve(),
        prototypes=tuple(PrototypeUse.of(m, rng.poisson(rng.gamma(1.2, 3, 64)).tolist()) for m in MODALITIES),
        scores=scores(),
        label_note="Label: a visible finding, yes or no.",
        seed_note="A seed draws the random weights and the classifier's training subset.",
        steps=(StepTime("Generate patients", 21.4, "871 files"), StepTime("Pretrain", 262.0, "1,000 steps")),
        commands=("medswav demo ./demo",),
        versions={"medswav": "0.1.0", "torch": "2.13.0"},
        machine={"Processors": "2"},
        dataset={"Fingerprint": "abc"},
        config="max_steps: 1000\n",
    )
