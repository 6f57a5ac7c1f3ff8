"""The page at `/docs`: it shows `/openapi.json`, and loads nothing from another host."""

PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>sparse-gkd teacher server</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto }
  code, pre { font: 13px/1.4 ui-monospace, monospace }
  pre { background: #8881; overflow: auto; padding: .7rem }
  summary { cursor: pointer; padding: .3rem 0 }
</style>
<h1>sparse-gkd teacher server</h1>
<p>Routes and messages of <a href="openapi.json">openapi.json</a>.</p>
<h2>Routes</h2><div id="routes"></div>
<h2>Messages</h2><div id="schemas"></div>
<noscript>This page needs JavaScript; <a href="openapi.json">openapi.json</a> does not.</noscript>
<script>
  function entry(parent, title, text, value) {
    const details = document.createElement("details");
    details.id = title;
    const summary = document.createElement("summary");
    const name = document.createElement("code");
    name.textContent = title;
    summary.append(name, " " + text);
    const shown = document.createElement("pre");
    shown.textContent = JSON.stringify(value, null, 2);
    details.append(summary, shown);
    document.getElementById(parent).append(details);
  }
  fetch("openapi.json").then(answer => answer.json()).then(api => {
    for (const [path, methods] of Object.entries(api.paths))
      for (const [method, route] of Object.entries(methods))
        entry("routes", method.toUpperCase() + " " + path, route.summary || "", route);
    for (const [name, schema] of Object.entries(api.components.schemas))
      entry("schemas", name, (schema.description || "").split("\\n")[0], schema);
  });
</script>
</html>
"""
# The browser then loads nothing from another host.
POLICY = "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
