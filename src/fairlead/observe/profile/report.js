"use strict";
// The page of one profile. Everything that came from the server is set as text: nothing of it is ever read as HTML.
(() => {
  const found = JSON.parse(document.getElementById("found").textContent);
  const page = document.getElementById("page");
  const COLORS = ["#8fb8de", "#a8d5ba", "#f2c9a1", "#d7b9e0", "#f0e0a0", "#f2a9a9", "#b5c9a0", "#c7d2e8", "#e8b7cf", "#a5dcd9", "#d9c6a5", "#bcd98f"];
  const node = (tag, text, name) => {
    const made = document.createElement(tag);
    if (text !== undefined && text !== null) made.textContent = text;
    if (name) made.className = name;
    return made;
  };
  const add = (parent, ...children) => { for (const child of children) parent.appendChild(child); return parent; };
  const span = seconds => seconds >= 1 ? `${seconds.toPrecision(3)} s` : seconds >= 1e-3 ? `${(seconds * 1e3).toPrecision(3)} ms` : `${(seconds * 1e6).toPrecision(3)} µs`;
  const percent = share => `${(share * 100).toFixed(1)} %`;
  const size = bytes => Math.abs(bytes) >= 1 << 30 ? `${(bytes / (1 << 30)).toFixed(2)} GiB` : Math.abs(bytes) >= 1 << 20 ? `${(bytes / (1 << 20)).toFixed(1)} MiB` : `${(bytes / 1024).toFixed(1)} KiB`;
  const table = (heads, rows) => {
    const made = node("table"), head = node("tr");
    for (const [text, kind] of heads) add(head, node("th", text, kind));
    add(made, add(node("thead"), head));
    const body = node("tbody");
    for (const row of rows) {
      const line = node("tr");
      row.forEach((cell, at) => add(line, cell instanceof Node ? add(node("td"), cell) : node("td", cell, heads[at][1])));
      add(body, line);
    }
    return add(node("div", null, "scroll"), add(made, body));
  };

  // Head and answer
  const answer = found.answer;
  add(page, node("h1", `${found.model}@${found.version} under the profiler`),
    node("p", `${new Date(found.began * 1e3).toISOString().replace("T", " ").slice(0, 19)} UTC, ${found.seconds} s, ${answer.num_requests} requests ended${answer.num_failed ? ` (${answer.num_failed} failed)` : ""}`, "faint"));
  add(page, add(node("div", null, "answer"), node("b", answer.bottleneck), node("span", answer.advice)));

  // Layers
  if (answer.layers.length) {
    add(page, node("h2", "Where the time of a request goes"));
    const bar = node("div", null, "bar");
    bar.setAttribute("role", "img");
    bar.setAttribute("aria-label", answer.layers.map(layer => `${layer.name} ${percent(layer.share)}`).join(", "));
    answer.layers.forEach((layer, at) => {
      const part = node("span", layer.share > 0.06 ? `${layer.name} ${percent(layer.share)}` : "");
      part.style.flex = `${layer.share} 1 0`;
      part.style.background = COLORS[at % COLORS.length];
      part.title = `${layer.name}: ${span(layer.seconds)}, ${percent(layer.share)}`;
      add(bar, part);
    });
    add(page, bar, table([["layer"], ["what passes it"], ["per request", "number"], ["share", "number"]], answer.layers.map((layer, at) => {
      const swatch = node("span", null, "swatch");
      swatch.style.background = COLORS[at % COLORS.length];
      return [add(node("span"), swatch, document.createTextNode(layer.name)), layer.about, span(layer.seconds), percent(layer.share)];
    })));
  }

  // Processes
  add(page, node("h2", "Processes"), table(
    [["process"], ["stacks by"], ["samples", "number"], ["holds the lock", "number"], ["memory", "number"], ["hottest function", "name"]],
    found.processes.map(each => [`${each.name} (${each.pid})`, each.sampler || "nobody", String(each.num_samples),
      each.gil_share === null ? "" : percent(each.gil_share), each.memory.length ? size(each.memory[each.memory.length - 1][1]) : "",
      each.top.length ? `${percent(each.top[0][1])} ${each.top[0][0]}` : ""])));

  // Flame graph
  const tree = (name) => ({ name, value: 0, children: new Map() });
  const trees = new Map();
  const all = tree("all processes");
  for (const each of found.processes) {
    const label = `${each.name} (${each.pid})`, mine = tree(label);
    for (const line of each.stacks.split("\n")) {
      const cut = line.lastIndexOf(" "), count = Number(line.slice(cut + 1));
      if (cut <= 0 || !Number.isFinite(count) || count <= 0) continue;
      const names = line.slice(0, cut).split(";");
      for (const root of [mine, all]) {
        let at = root;
        at.value += count;
        for (const frame of root === all ? [label, ...names] : names) {
          let next = at.children.get(frame);
          if (!next) at.children.set(frame, next = tree(frame));
          next.value += count;
          at = next;
        }
      }
    }
    if (mine.value) trees.set(label, mine);
  }
  if (all.value) {
    if (trees.size > 1) trees.set("all processes", all);
    const HIGH = 18, canvas = node("canvas"), seen = node("div"), search = node("input"), choice = node("select"), back = node("button", "zoom out"), matched = node("span", "", "faint");
    seen.id = "seen";
    seen.setAttribute("aria-live", "polite");
    search.type = "search";
    search.placeholder = "search functions";
    search.setAttribute("aria-label", "search functions");
    choice.setAttribute("aria-label", "process");
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", "flame graph: the table below tells the hottest functions");
    for (const name of trees.keys()) add(choice, node("option", name));
    add(page, node("h2", "Flame graph"), node("p", "Wide is what was often there. Click to zoom, Escape to zoom out.", "faint"),
      add(node("div", null, "tools"), choice, search, back, matched), canvas, seen);
    let root = trees.get(choice.value), focus = root, path = [], boxes = [], hot = null;
    const hue = name => { let hash = 0; for (let at = 0; at < name.length; at++) hash = (hash * 31 + name.charCodeAt(at)) | 0; return Math.abs(hash); };
    const depth = at => { let most = 0; for (const child of at.children.values()) most = Math.max(most, 1 + depth(child)); return most; };
    const draw = () => {
      const wide = canvas.clientWidth || 1100, dots = window.devicePixelRatio || 1, rows = path.length + 1 + depth(focus);
      canvas.height = rows * HIGH * dots;
      canvas.width = wide * dots;
      canvas.style.height = `${rows * HIGH}px`;
      const paint = canvas.getContext("2d"), wanted = search.value.toLowerCase();
      paint.scale(dots, dots);
      paint.font = "11px ui-monospace, monospace";
      paint.textBaseline = "middle";
      boxes = [];
      let hits = 0;
      const box = (at, x, width, row, above, over) => {
        if (width < 0.4) return;
        const match = wanted && at.name.toLowerCase().includes(wanted), number = hue(at.name);
        paint.fillStyle = match ? "#c026d3" : wanted ? `hsl(210 8% ${70 + number % 8}%)` : `hsl(${20 + number % 35} ${60 + number % 25}% ${62 + number % 12}%)`;
        paint.globalAlpha = above ? 0.5 : 1;
        paint.fillRect(x, row * HIGH, Math.max(width - 0.5, 0.4), HIGH - 1);
        paint.globalAlpha = 1;
        if (width > 30) {
          paint.fillStyle = match ? "#fff" : "#16181b";
          paint.save();
          paint.beginPath();
          paint.rect(x, row * HIGH, width - 4, HIGH);
          paint.clip();
          paint.fillText(at.name, x + 4, row * HIGH + HIGH / 2);
          paint.restore();
        }
        boxes.push({ at, x, width, row });
        if (match && !over) hits += at.value;
        if (above) return;
        let left = x;
        for (const child of [...at.children.values()].sort((a, b) => b.value - a.value)) {
          const part = width * child.value / at.value;
          box(child, left, part, row + 1, false, over || match);
          left += part;
        }
      };
      path.forEach((at, row) => box(at, 0, wide, row, true, true));
      box(focus, 0, wide, path.length, false, false);
      matched.textContent = wanted ? `${percent(hits / focus.value)} of what is shown` : "";
    };
    const under = event => { const place = canvas.getBoundingClientRect(), x = event.clientX - place.left, row = Math.floor((event.clientY - place.top) / HIGH); return boxes.find(box => box.row === row && x >= box.x && x < box.x + box.width); };
    const zoom = at => {
      const way = [], look = (here) => { way.push(here); if (here === at) return true; for (const child of here.children.values()) if (look(child)) return true; way.pop(); return false; };
      look(root);
      path = way.slice(0, -1);
      focus = at;
      draw();
    };
    canvas.addEventListener("mousemove", event => { const box = under(event); if (box !== hot) { hot = box; seen.textContent = box ? `${box.at.name}: ${box.at.value} samples, ${percent(box.at.value / root.value)} of ${root.name}` : ""; } });
    canvas.addEventListener("click", event => { const box = under(event); if (box) zoom(box.at); });
    addEventListener("keydown", event => { if (event.key === "Escape") zoom(root); });
    back.addEventListener("click", () => zoom(path.length ? path[path.length - 1] : root));
    search.addEventListener("input", draw);
    choice.addEventListener("change", () => { root = trees.get(choice.value); zoom(root); });
    addEventListener("resize", draw);
    if (trees.has("all processes")) { choice.value = "all processes"; root = trees.get("all processes"); }
    zoom(root);
    for (const each of found.processes) {
      if (!each.top.length) continue;
      add(page, node("p", `${each.name} (${each.pid}): the hottest functions`, "faint"), table([["function", "name"], ["own", "number"], ["with what it calls", "number"]], each.top.map(([name, own, total]) => [name, percent(own), percent(total)])));
    }
  }

  // Kernels
  for (const each of found.processes) {
    if (!each.kernels.length) continue;
    add(page, node("h2", `Operators and kernels of ${each.name} (${each.pid})`), node("p", `torch recorded ${span(each.kernel_seconds)}; the whole record is beside this page, for Perfetto or chrome://tracing`, "faint"),
      table([["name", "name"], ["kind"], ["calls", "number"], ["own time", "number"], ["share", "number"], ["each", "number"], ["allocated", "number"], ["shapes", "name"]],
        each.kernels.map(kernel => [kernel.name, kernel.kind, String(kernel.calls), span(kernel.seconds), percent(kernel.share), kernel.calls ? span(kernel.seconds / kernel.calls) : "", kernel.allocated_bytes ? size(kernel.allocated_bytes) : "", kernel.shapes])));
  }

  // Memory
  const curves = found.processes.filter(each => each.memory.length > 1);
  if (curves.length) {
    add(page, node("h2", "Memory"));
    const SVG = "http://www.w3.org/2000/svg", WIDE = 1000, TALL = 180, LEFT = 70;
    const shape = (tag, attributes, text) => { const made = document.createElementNS(SVG, tag); for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value); if (text) made.textContent = text; return made; };
    const picture = shape("svg", { viewBox: `0 0 ${WIDE} ${TALL}`, preserveAspectRatio: "none", role: "img", "aria-label": "resident memory of each process over time" });
    const most = 1.1 * Math.max(...curves.flatMap(each => each.memory.map(point => point[1]))), last = Math.max(...curves.map(each => each.memory[each.memory.length - 1][0])) || 1;
    for (const part of [0, 0.5, 1]) {
      const y = TALL - 20 - part * (TALL - 40);
      add(picture, shape("line", { x1: LEFT, x2: WIDE, y1: y, y2: y, stroke: "currentColor", "stroke-opacity": 0.15 }), shape("text", { x: 4, y: y + 4 }, size(part * most)));
    }
    add(picture, shape("text", { x: LEFT, y: TALL - 4 }, "0 s"), shape("text", { x: WIDE - 50, y: TALL - 4 }, span(last)));
    curves.forEach((each, at) => {
      for (const [index, dashed] of [[1, ""], [2, "4 3"]]) {
        const points = each.memory.filter(point => point[index]).map(point => `${LEFT + (WIDE - LEFT) * point[0] / last},${TALL - 20 - (TALL - 40) * point[index] / most}`).join(" ");
        if (points) add(picture, shape("polyline", { points, fill: "none", stroke: COLORS[at % COLORS.length], "stroke-width": 2, "stroke-dasharray": dashed, "vector-effect": "non-scaling-stroke" }));
      }
    });
    add(page, picture, table([["process"], ["resident (line)", "number"], ["its own (dashed)", "number"], ["grew by", "number"], ["device"]], curves.map((each, at) => {
      const swatch = node("span", null, "swatch"), points = each.memory, end = points[points.length - 1];
      swatch.style.background = COLORS[at % COLORS.length];
      return [add(node("span"), swatch, document.createTextNode(`${each.name} (${each.pid})`)), size(end[1]), size(end[2]), size(end[1] - points[0][1]), Object.entries(each.device_memory).map(([name, value]) => `${name} ${name.includes("bytes") ? size(value) : value}`).join(", ")];
    })));
  }
  if (found.notes.length) {
    add(page, node("h2", "What could not be had"));
    for (const note of found.notes) add(page, node("p", note));
  }
})();
