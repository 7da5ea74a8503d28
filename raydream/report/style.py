"""The style sheet of the report: light or dark by the reader's setting, one column on a phone, nothing to load."""

STYLE = """
:root{color-scheme:light dark;--page:#faf9f7;--card:#fff;--line:#dedad3;--text:#1d1b19;--quiet:#5d5850;--accent:#a3470f;
--series-0:#2f63c8;--series-1:#c53d52;--series-2:#1f8262;--series-3:#a36a08;--series-4:#7448c2;--series-5:#0b7f95;
--series-6:#a73f90;--series-7:#63697a}
@media(prefers-color-scheme:dark){:root{--page:#131316;--card:#1c1c21;--line:#35353d;--text:#ecebe8;--quiet:#a9a6a0;
--accent:#ffa365;--series-0:#7fa8ff;--series-1:#ff8a96;--series-2:#5fd0a8;--series-3:#ecb64f;--series-4:#bb9fff;
--series-5:#56c8df;--series-6:#ef93da;--series-7:#a8aebb}}
*{box-sizing:border-box}
body{margin:0 auto;padding:2.5rem clamp(1rem,4vw,3rem);max-width:82rem;background:var(--page);color:var(--text);
font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1,h2,h3{line-height:1.2;text-wrap:balance}
h1{margin:.2rem 0 1.4rem;font-size:clamp(1.4rem,1rem + 2.2vw,2.4rem);letter-spacing:-.02em;overflow-wrap:anywhere}
h2{margin:3rem 0 1rem;font-size:1.3rem}
h3{margin:.8rem 0 .1rem;font-size:1rem}
small,.kicker,.missing,footer,dt,figcaption small{color:var(--quiet)}
.kicker{margin:0;font-size:.9rem}
a{color:var(--accent)}
a:focus-visible,summary:focus-visible,.strip:focus-visible,video:focus-visible{outline:3px solid var(--accent);
outline-offset:2px}
.summary{display:flex;flex-wrap:wrap;gap:.8rem 2.2rem;margin:0}
.summary dt{font-size:.85rem}
.summary dd{margin:0;font-weight:600;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.cards{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(46%,15rem),1fr))}
.card{padding:clamp(.5rem,1vw,.8rem);background:var(--card);border:1px solid var(--line);border-radius:.8rem}
.card video,.card img{display:block;width:100%;aspect-ratio:1;object-fit:contain;border-radius:.5rem;
background:var(--page)}
.card>.missing{display:grid;place-items:center;margin:0;aspect-ratio:1;border:1px dashed var(--line);
border-radius:.5rem}
.links{margin:.1rem 0 .6rem}
.card table{font-size:.85rem}
table{width:100%;border-collapse:collapse;font-variant-numeric:tabular-nums}
caption{padding:.6rem 0 .3rem;text-align:left;font-weight:600}
th{padding:.25rem .8rem .25rem 0;text-align:left;font-weight:400;color:var(--quiet);vertical-align:top;
overflow-wrap:anywhere}
td{padding:.25rem 0;vertical-align:top;overflow-wrap:anywhere}
tr+tr>*{border-top:1px solid var(--line)}
.card td,.number{text-align:right}
.number{padding-right:.8rem;white-space:nowrap}
.total>*{color:var(--text);font-weight:600}
.pair th{overflow-wrap:break-word}
.links small{white-space:nowrap}
.bar{width:40%;vertical-align:middle}
@media(max-width:30rem){.bar{width:22%}}
.bar i{display:block;height:.7rem;min-width:1px;border-radius:.2rem;background:var(--series-0)}
.pair{display:grid;gap:0 3rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr))}
.strip{display:flex;gap:.8rem;overflow-x:auto;padding-bottom:.6rem}
.strip figure{flex:none;width:min(80vw,22rem);margin:0}
.strip img{display:block;width:100%;border-radius:.5rem}
figcaption{font-size:.85rem}
.charts{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,24rem),1fr))}
.chart{margin:0;padding:.8rem;background:var(--card);border:1px solid var(--line);border-radius:.8rem}
.chart figcaption{margin-bottom:.3rem;font-size:.95rem;font-weight:600}
.chart figcaption small{font-weight:400}
.chart>svg{display:block;width:100%;height:auto}
.chart text{fill:var(--quiet);font-size:12px}
.grid{stroke:var(--line)}
.axis{stroke:var(--quiet)}
.line{fill:none;stroke-width:2;stroke-linejoin:round}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1rem;margin:.4rem 0 0;padding:0;list-style:none;font-size:.85rem}
.key{width:1.25rem;height:.5rem;margin-right:.35rem;vertical-align:middle}
details{margin:.5rem 0;padding:.6rem .9rem;background:var(--card);border:1px solid var(--line);border-radius:.8rem}
summary{cursor:pointer;font-weight:600}
details table{margin-top:.5rem;font-size:.9rem}
details th{width:45%}
footer{margin-top:3rem;font-size:.85rem}
@media print{details:not([open])>*{display:revert}}
"""
