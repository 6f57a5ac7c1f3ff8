"""The style sheet of the page: light and dark, wide and narrow."""

# One colour says one thing: a run and its student have one of c0 to c5, teachers are grey (ct),
# green and red say right and wrong, and yellow is divergence.
CSS = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#59636e;--paper:#fff;--panel:#f6f8fa;
--rule:#d1d9e0;--good:#1a7f37;--bad:#c0362c;--heat:232 176 0;--ct:#59636e;
--c0:#2563c9;--c1:#b85c06;--c2:#8a3ffc;--c3:#0b7285;--c4:#b3255c;--c5:#7a5230}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9aa4af;--paper:#0d1117;
--panel:#161b22;--rule:#30363d;--good:#4cc46b;--bad:#ff7b72;--heat:150 112 0;--ct:#9aa4af;
--c0:#6ea8fe;--c1:#f0a35e;--c2:#bc8cff;--c3:#3bc9db;--c4:#ff7eb6;--c5:#c9a27e}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1100px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.7rem;margin:0 0 4px;overflow-wrap:anywhere}h2{font-size:1.2rem;margin:40px 0 12px}
.lead{margin:0 0 8px;max-width:75ch;overflow-wrap:anywhere}
.status{margin:0 0 20px;padding:8px 12px;background:var(--panel);border:1px solid var(--rule);
border-radius:8px}
.note{color:var(--soft);font-size:.85rem;line-height:1.4;margin:4px 0 8px}
:focus-visible{outline:2px solid var(--ink);outline-offset:1px}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%}
th,td{padding:8px 12px;text-align:right;border-bottom:1px solid var(--rule);vertical-align:top}
thead th{color:var(--soft);font-weight:600;vertical-align:bottom}
tbody th{font-weight:400;overflow-wrap:anywhere;min-width:8em}
th:first-child{text-align:left}
tr.best>*{font-weight:700;background:var(--panel)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(300px,100%),1fr));gap:20px}
figure{margin:0;padding:12px;background:var(--panel);border:1px solid var(--rule);border-radius:8px;
display:flex;flex-direction:column}
figure svg{margin-top:auto}
figcaption{font-weight:600;display:flex;flex-wrap:wrap;gap:2px 10px;align-items:baseline}
.badge{font-style:normal;font-weight:400;font-size:.8rem;color:var(--soft);white-space:nowrap}
.constant{margin:16px 0 0}.constant li{margin:8px 0}.constant .note{margin:0}
svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font-size:12px}
svg.piece{display:inline-block;width:24px;height:8px;margin-right:6px;vertical-align:middle}
.grid{stroke:var(--rule);stroke-width:1}
.line{fill:none;stroke-width:2;stroke-linejoin:round}.piece .line{stroke-width:3}
td small{color:var(--soft);white-space:nowrap}code{font-size:.95em;white-space:nowrap}
tr,pre{--run:var(--soft)}
.n0{--run:var(--c0)}.n1{--run:var(--c1)}.n2{--run:var(--c2)}
.n3{--run:var(--c3)}.n4{--run:var(--c4)}.n5{--run:var(--c5)}
.range{display:block;position:relative;height:6px;margin-top:4px;min-width:120px;
background:var(--panel);border-radius:3px}
.range i{position:absolute;top:2px;height:2px;background:var(--run)}
.range b{position:absolute;width:6px;height:6px;margin-left:-3px;border-radius:3px;
background:var(--run)}
.zero{background:linear-gradient(90deg,transparent calc(50% - 1px),var(--soft) 0 calc(50% + 1px),
transparent 0),var(--panel)}
.zero i{top:1px;height:4px;border-radius:2px;min-width:2px;background:var(--soft)}
.better i{background:var(--good)}.worse i{background:var(--bad)}
.line.ct{stroke:var(--ct)}.dot.ct{fill:var(--ct)}b.ct{background:var(--ct)}
.line.c0{stroke:var(--c0)}.line.c1{stroke:var(--c1)}.line.c2{stroke:var(--c2)}
.line.c3{stroke:var(--c3)}.line.c4{stroke:var(--c4)}.line.c5{stroke:var(--c5)}
.dot.c0{fill:var(--c0)}.dot.c1{fill:var(--c1)}.dot.c2{fill:var(--c2)}
.dot.c3{fill:var(--c3)}.dot.c4{fill:var(--c4)}.dot.c5{fill:var(--c5)}
b.c0{background:var(--c0)}b.c1{background:var(--c1)}b.c2{background:var(--c2)}
b.c3{background:var(--c3)}b.c4{background:var(--c4)}b.c5{background:var(--c5)}
ul{list-style:none;padding:0}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;margin:8px 0 0;font-size:.85rem;
color:var(--soft);overflow-wrap:anywhere}
.legend b{color:var(--ink)}
.times{margin:4px 0 16px}
.times li{display:grid;grid-template-columns:minmax(130px,200px) 1fr 130px;gap:2px 12px;
align-items:center}
.times i{height:12px}.times b{display:block;height:100%;min-width:1px;border-radius:2px}
.times small{color:var(--soft)}
article{border:1px solid var(--rule);border-radius:8px;padding:12px;margin-bottom:16px}
article p{margin:0 0 10px;font-weight:600;white-space:pre-wrap;overflow-wrap:anywhere}
.cells{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(240px,100%),1fr));gap:12px}
h3{font-size:.9rem;margin:0 0 4px;color:var(--soft);overflow-wrap:anywhere}
h3 em{font-style:normal;margin-left:.4em}h3 small{font-weight:400}
.passes em{color:var(--good)}.fails em{color:var(--bad)}
pre{margin:0;padding:10px;background:var(--panel);border-radius:6px;white-space:pre-wrap;
overflow-wrap:anywhere;font:13px/1.45 ui-monospace,"SF Mono",Consolas,monospace}
.key{color:var(--soft);font-size:.85rem}
.key i{display:inline-block;width:80px;height:10px;border-radius:2px;vertical-align:middle;
background:linear-gradient(90deg,transparent,rgb(var(--heat)/.75))}
.tokens{line-height:1.7}
.tokens b{font-weight:400;border-radius:2px;background:rgb(var(--heat)/calc(var(--d)*.75))}
.tokens b:hover,.tokens b:focus{outline:2px solid var(--ink)}
.tokens span{display:none}
.tokens b:hover>span,.tokens b:focus>span{display:block;position:fixed;z-index:1;right:16px;
bottom:16px;width:min(420px,calc(100vw - 32px));padding:12px;background:var(--paper);
border:1px solid var(--rule);border-radius:8px;box-shadow:0 4px 24px rgb(0 0 0/.3);
font:13px/1.3 system-ui,sans-serif}
.tokens s{display:grid;grid-template-columns:minmax(60px,auto) 1fr;gap:6px 10px;margin-top:8px;
text-decoration:none;align-items:center}
.tokens u{text-decoration:none;font-family:ui-monospace,monospace;overflow:hidden;
text-overflow:ellipsis;white-space:nowrap;max-width:130px}
.tokens q{quotes:none}
.tokens a{display:block;font-size:11px;padding-left:4px;margin-bottom:1px;
background:linear-gradient(var(--bar),var(--bar)) left/var(--p,0%) 100% no-repeat}
.tokens .t{--bar:color-mix(in srgb,var(--ct) 45%,transparent)}
.tokens .s{--bar:color-mix(in srgb,var(--run) 45%,transparent)}
.tokens .t:before{content:"teacher ";color:var(--soft)}
.tokens .s:before{content:"student ";color:var(--soft)}
@media(min-width:601px){.pairs{grid-template-columns:1fr 1fr}}
@media(max-width:600px){h2{margin-top:28px}
.times li{grid-template-columns:1fr auto}.times i{grid-row:2;grid-column:1/3}
table,tbody,tr,tbody th,td{display:block}
thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
tr{padding:8px 0;border-bottom:1px solid var(--rule)}
tbody th,td{border:0;padding:3px 8px;text-align:left}tbody th{font-weight:600}
td{display:grid;grid-template-columns:minmax(110px,40%) 1fr;gap:0 10px}
td:empty{display:none}td:before{content:attr(data-label);color:var(--soft)}
.range{grid-column:2;min-width:0}}
"""
