"""The report's style sheet: light, dark, phone, print; system fonts, nothing loaded."""

CSS = """
:root{color-scheme:light dark;
--paper:#fff;--ink:#16202b;--soft:#5b6876;--line:#dfe4ea;--wash:#f4f6f8;--accent:#0b6e75;
--accent-wash:#e3f1f1;
--random:#8a94a0;--pixels:#c08a2e;--warn:#8a5a00;--warn-wash:#fdf4de;
--c0:#2f6db5;--c1:#c2571a;--c2:#7b4fa3;--c3:#3d8b3d;--c4:#a83a5b;--c5:#7a6a1f}
@media screen and (prefers-color-scheme:dark){:root{
--paper:#10161c;--ink:#e8edf2;--soft:#9aa7b4;--line:#2a343e;--wash:#18212a;--accent:#4cc3c4;
--accent-wash:#12302f;
--random:#7d8995;--pixels:#d9a648;--warn:#f0c566;--warn-wash:#2c2411;
--c0:#7fb0ea;--c1:#ef9257;--c2:#bd95e3;--c3:#7cc67c;--c4:#e3819d;--c5:#cdbb62}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:58rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
.kicker{margin:0;color:var(--soft);font-size:.875rem}
h1{font-size:clamp(1.65rem,1.2rem + 2.2vw,2.5rem);line-height:1.15;letter-spacing:-.02em;
margin:.5rem 0 .75rem;
max-width:24ch;text-wrap:balance;font-weight:680}
.lead{font-size:1.0625rem;max-width:62ch;margin:0 0 1.75rem;color:var(--soft)}
h2{font-size:1.375rem;letter-spacing:-.01em;line-height:1.25;margin:0 0 .35rem}
h3{font-size:1rem;margin:1.75rem 0 .5rem}
section{margin-top:3.25rem;padding-top:1.5rem;border-top:1px solid var(--line)}
section>p{max-width:66ch;margin:.25rem 0 1.25rem;color:var(--soft)}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:1.25rem 2rem;margin:0;
padding:0}
.facts div{border-top:2px solid var(--accent);padding-top:.5rem}
.facts dt{font-size:.8125rem;color:var(--soft)}
.facts dd{margin:0;font-size:1.625rem;line-height:1.2;font-weight:640;letter-spacing:-.01em;
font-variant-numeric:tabular-nums}
.notice{background:var(--warn-wash);border-left:3px solid var(--warn);padding:.7rem 1rem;margin:1.25rem 0;
border-radius:0 4px 4px 0;font-size:.9375rem;max-width:none}
section>p.notice{color:inherit;max-width:none}
.notice p{margin:.2rem 0}.missing{background:var(--wash);padding:.8rem 1rem;border-radius:4px}
.scroll{overflow-x:auto;margin:.5rem 0 1rem}
table{border-collapse:collapse;width:100%;font-size:.9375rem}
th,td{text-align:left;padding:.42rem 1rem .42rem 0;border-bottom:1px solid var(--line);
vertical-align:baseline}
th{font-size:.8125rem;font-weight:600;color:var(--soft)}
tbody th{font-size:inherit;color:inherit}
th:last-child,td:last-child{padding-right:0}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
tfoot td,tfoot th{border-bottom:0;font-weight:640;color:var(--ink);font-size:.9375rem}
small,.sub{color:var(--soft);font-size:.8125rem}
.sub{display:block;white-space:nowrap}
.won{color:var(--accent);font-weight:640}
.sub code{font-size:inherit}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.8125rem}
pre{background:var(--wash);padding:.9rem 1rem;border-radius:4px;overflow-x:auto;line-height:1.5;
margin:.5rem 0}
details{margin-top:1rem}summary{cursor:pointer;font-weight:600}
img{display:block;height:auto}
.sheets{display:grid;grid-template-columns:1fr 1fr;gap:0 1.5rem}
.sheet{display:grid;grid-template-columns:repeat(4,1fr);gap:3px;background:#000;padding:3px;border-radius:4px}
.sheet span{position:relative;aspect-ratio:1;overflow:hidden}
.sheet img{position:absolute;inset:0;width:100%;height:100%;object-fit:contain}
.views{display:grid;grid-template-columns:minmax(0,13.9rem) 1fr;gap:1.25rem 1.5rem;align-items:start;
margin:0 0 2rem}
.views figure{margin:0}
.views .whole{width:100%;aspect-ratio:1;object-fit:contain;background:#000;border-radius:4px}
figcaption,.caption{font-size:.8125rem;color:var(--soft);margin-top:.35rem}
.crops{display:flex;flex-wrap:wrap;gap:6px}
.crops+.crops{margin-top:6px}
.crops img{image-rendering:pixelated;border-radius:2px;background:#000}
.crops .large{width:8.5rem}.crops .small{width:5.1rem}
.legend{display:flex;flex-wrap:wrap;gap:.25rem 1.5rem;font-size:.875rem;margin:.5rem 0 .75rem}
.legend span{display:inline-flex;align-items:center;gap:.5rem}
.legend .dot{position:static;transform:none}
.auc{margin:.5rem 0 1.75rem}
.auc .row{display:grid;grid-template-columns:6.2rem 1fr;align-items:center;gap:.75rem}
.auc .row b{font-weight:600;font-size:.9375rem}
.auc .track{position:relative;height:3.1rem;margin:0 .6rem}
.auc .axis .track{height:1.4rem}.auc .axis b{font-weight:400;color:var(--soft);font-size:.8125rem}
.auc .axis span{position:absolute;transform:translateX(-50%);font-size:.8125rem;color:var(--soft);top:.1rem}
.auc .row+.row:not(.axis){border-top:1px solid var(--line)}
.auc .tick{position:absolute;top:0;bottom:0;width:1px;background:var(--line)}
.dot{position:absolute;width:.8rem;height:.8rem;border-radius:50%;top:50%;transform:translate(-50%,-50%);
flex:none;
border:2px solid var(--paper)}
.range{position:absolute;height:.3rem;border-radius:.15rem;top:50%;transform:translateY(-50%);opacity:.45;
min-width:2px}
.pretrained{background:var(--accent)}.random{background:var(--random)}.pixels{background:var(--pixels)}
.dot.pretrained{width:1.05rem;height:1.05rem}
.track .pretrained{top:26%}.track .random{top:52%}.track .pixels{top:76%}
.plot.lines{padding:.5rem 8rem 2.2rem 2.6rem}
.area{position:relative;height:19rem}
.plot svg{display:block;width:100%;height:100%;overflow:visible}
.plot path{vector-effect:non-scaling-stroke;fill:none}
.plot .grid{stroke:var(--line);stroke-width:1}
.plot .line{stroke-width:1.25;stroke-linejoin:round}.plot .line.main{stroke-width:2.75;stroke:var(--ink)}
.plot .line.reference{stroke:var(--soft);stroke-dasharray:5 4;stroke-width:1.25}
.plot span{position:absolute;font-size:.8125rem;color:var(--soft);white-space:nowrap;line-height:1}
.plot .y{right:100%;margin-right:.5rem;transform:translateY(-50%)}
.plot .x{top:100%;margin-top:.5rem;transform:translateX(-50%)}
.plot .end{left:100%;margin-left:.6rem;transform:translateY(-50%)}
.plot .note{background:color-mix(in srgb,var(--paper) 80%,transparent);padding:0 .2rem;
right:.25rem;transform:translateY(-140%)}
.plot .note.under{transform:translateY(35%)}
.plot span.main{color:var(--ink);font-weight:640}
.m0{stroke:var(--c0)}.m1{stroke:var(--c1)}.m2{stroke:var(--c2)}.m3{stroke:var(--c3)}.m4{stroke:var(--c4)}
.m5{stroke:var(--c5)}
.plot span.m0{color:var(--c0)}.plot span.m1{color:var(--c1)}.plot span.m2{color:var(--c2)}
.plot span.m3{color:var(--c3)}.plot span.m4{color:var(--c4)}.plot span.m5{color:var(--c5)}
.plot .fill{stroke:none}.fill.m0{fill:var(--c0)}.fill.m1{fill:var(--c1)}.fill.m2{fill:var(--c2)}
.fill.m3{fill:var(--c3)}
.fill.m4{fill:var(--c4)}.fill.m5{fill:var(--c5)}
.uses{display:grid;grid-template-columns:repeat(auto-fit,minmax(11.5rem,1fr));gap:1.5rem 2rem}
.uses h4{margin:0 0 .4rem;font-size:.9375rem}
.plot.bars{height:6.5rem;border-bottom:1px solid var(--line)}
footer{margin-top:3rem;color:var(--soft);font-size:.8125rem}
@media (max-width:40rem){main{padding:1.5rem 1rem 3rem}.sheets{grid-template-columns:1fr}
section{margin-top:2.25rem}.facts{grid-template-columns:1fr 1fr;gap:1rem 1.25rem}.facts dd{font-size:1.375rem}
.views{grid-template-columns:1fr}.views .whole{max-width:13rem}.crops .large{width:6.6rem}
.crops .small{width:3.96rem}
.plot.lines{padding-right:6.6rem;padding-left:2rem}.area{height:15rem}
.auc .row{grid-template-columns:5.4rem 1fr;gap:.25rem}
table.wide{min-width:46rem}}
@media print{html{font-size:11px}main{max-width:none;padding:0}section{margin-top:2rem}
h2,h3,section>p{break-after:avoid}p{break-inside:avoid}
.views,.uses div,.auc,.plot,tr,.facts,.sheet{break-inside:avoid}
.scroll{overflow:visible}table.wide{min-width:0}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}pre{white-space:pre-wrap}}
"""

# Of contact sheets, beside CSS.
STRIPS = """
.strip{display:grid;grid-template-columns:repeat(auto-fill,minmax(6.4rem,1fr));gap:3px;margin:.3rem 0 1.5rem}
.strip figure{margin:0;background:#000;border-radius:3px;overflow:hidden}
.strip img{width:100%;aspect-ratio:1;object-fit:contain}
.strip figcaption{margin:0;padding:.1rem .35rem;background:var(--wash);font-variant-numeric:tabular-nums}
"""
