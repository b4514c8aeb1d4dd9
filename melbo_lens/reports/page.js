"use strict";
// The page's tables, its map, and the marks that a reader sets. What a model wrote is only ever set as text.
const KINDS = ["unsteered", "steered", "random"], CHANGES = ["unchanged", "other wording", "other content", "noise"];
const SIGNS = { "1": "+", "-1": "−", "0": "" }, PAGE = 50, LONG = 600;
const at = id => document.getElementById(id), many = n => n.toLocaleString("en");

// Every character is made visible, as `melbo_lens.tables.seen` does it.
const HIDDEN = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}\p{Co}\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0]/gu;
function seen(text) {
  return text.replace(HIDDEN, (c, i) => {
    if (c === "\n" || c === "\t") return c;
    const beside = [text.slice(0, i).at(-1) ?? "", text.slice(i + 1).at(0) ?? ""];
    if (c === "\u200d" && beside.every(b => b > "\x7f" && !/\p{Cf}/u.test(b))) return c;
    return `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });
}
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}
// A long text is cut, with a button that shows the rest.
function longText(text) {
  const box = make("span", { dir: "auto" }, seen(text.slice(0, LONG)));
  if (text.length > LONG) {
    const more = make("button", { type: "button" }, `… all ${many(text.length)} characters`);
    more.addEventListener("click", () => { box.textContent = seen(text); });
    box.append(more);
  }
  return box;
}

// A table shows one page of the numbers that its filter leaves, in an order that its headings choose.
function table(element, pages, what, columns, all, matches) {
  let page = 0, shown = all, order = null, descending = false;
  const body = make("tbody"), heading = make("tr"), status = make("span", { className: "dim" });
  status.setAttribute("role", "status");
  const [back, next] = ["Previous", "Next"].map((name, i) => {
    const button = make("button", { type: "button" }, name);
    button.addEventListener("click", () => { page += 2 * i - 1; draw(); });
    return button;
  });
  for (const column of columns) {
    const cell = make("th", { scope: "col", className: column.number ? "n" : column.className ?? "" });
    cell.hidden = Boolean(column.off?.());
    if (column.value) {
      const button = make("button", { type: "button" }, column.name);
      button.addEventListener("click", () => {
        descending = order === column ? !descending : Boolean(column.number);
        order = column;
        heading.querySelectorAll("[aria-sort]").forEach(other => other.removeAttribute("aria-sort"));
        cell.setAttribute("aria-sort", descending ? "descending" : "ascending");
        filter();
      });
      cell.append(button);
    } else cell.textContent = column.name;
    column.heading = cell;
    heading.append(cell);
  }
  element.replaceChildren(make("thead", {}, heading), body);
  pages.append(back, next, status);
  function draw() {
    const last = Math.max(0, Math.ceil(shown.length / PAGE) - 1);
    page = Math.min(Math.max(page, 0), last);
    body.replaceChildren(...shown.slice(page * PAGE, (page + 1) * PAGE).map(i => {
      const row = make("tr");
      for (const column of columns) {
        if (column.off?.()) continue;
        const cell = make("td", { className: column.number ? "n" : column.className ?? "" }), content = column.cell(i);
        if (column.label) cell.dataset.name = column.label;
        if (content !== "" && content !== null) cell.append(content);
        row.append(cell);
      }
      return row;
    }));
    columns.forEach(column => { column.heading.hidden = Boolean(column.off?.()); });
    back.disabled = page === 0;
    next.disabled = page === last;
    const first = page * PAGE;
    status.textContent = shown.length === 0 ? `none of ${many(all.length)} ${what}`
      : `${many(first + 1)} to ${many(Math.min(first + PAGE, shown.length))} of ${shown.length === all.length ? "" : `${many(shown.length)} that match, of `}${many(all.length)} ${what}`;
  }
  function filter() {
    shown = all.filter(matches());
    if (order) {
      const values = new Map(shown.map(i => [i, order.value(i)]));
      shown.sort((i, j) => {
        const [a, b] = [values.get(i), values.get(j)];
        if (a === null || b === null) return (a === null) - (b === null);
        return (a < b ? -1 : a > b ? 1 : 0) * (descending ? -1 : 1);
      });
    }
    page = 0;
    draw();
  }
  filter();
  return { filter, draw };
}

async function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

async function main() {
  const D = await unpacked(at("data").textContent), R = D.rows, V = D.directions;
  const groups = D.groups, groupName = g => g < 0 ? "" : `${g + 1}. ${seen(groups[g])}`;
  const color = g => g < 0 ? "#8c8c8c" : D.colors[g];
  const numberOf = new Map(V.anchor.map((anchor, i) => [anchor, i]));
  const lower = D.texts.map(text => text.toLowerCase());
  const plain = new Map();
  R.kind.forEach((kind, i) => { if (kind === 0) plain.set(`${R.prompt[i]} ${R.sample[i]}`, R.text[i]); });
  const short = value => value === null || value === undefined ? "" : String(value);
  const nats = logProb => logProb === null ? "" : -logProb < .01 ? "less than 0.01" : (-logProb).toFixed(2);
  const dot = g => { const e = make("span", { className: "dot" }); e.style.setProperty("--dot", color(g)); return e; };
  const groupCell = g => g < 0 ? "" : make("span", {}, dot(g), g < D.cards ? make("a", { href: `#group-${g}` }, groupName(g)) : groupName(g));
  const link = d => make("a", { href: `#${V.anchor[d]}` }, V.name[d]);
  for (const select of document.querySelectorAll("select[name=group]"))
    select.append(...groups.map((_, g) => make("option", { value: String(g) }, groupName(g).slice(0, 60))));

  // marks: the anchor of a direction -> the name that the reader gave it
  let marks = new Map();
  const place = () => { const [first] = location.hash.slice(1).split("&"); return first.includes("=") ? "" : decodeURIComponent(first); };
  function readMarks() {
    const entry = location.hash.slice(1).split("&").find(part => part.startsWith("marks="));
    if (!entry) return false;
    try {
      const said = JSON.parse(decodeURIComponent(entry.slice(6)));
      marks = new Map(Object.entries(said).filter(([anchor, name]) => numberOf.has(anchor) && typeof name === "string"));
    } catch { return false; }
    return true;
  }
  function keepMarks() {
    const parts = [encodeURIComponent(place()), marks.size ? `marks=${encodeURIComponent(JSON.stringify(Object.fromEntries(marks)))}` : ""];
    history.replaceState(null, "", `#${parts.filter(Boolean).join("&")}`);
  }
  function mark(anchor, yes = !marks.has(anchor)) {
    if (yes) marks.set(anchor, marks.get(anchor) ?? ""); else marks.delete(anchor);
    keepMarks();
    showMarks();
  }
  function markButton(anchor) {
    const button = make("button", { type: "button", className: "mark" });
    button.dataset.anchor = anchor;
    button.addEventListener("click", () => mark(anchor));
    dress(button);
    return button;
  }
  function dress(button) {
    const on = marks.has(button.dataset.anchor), name = V.name[numberOf.get(button.dataset.anchor)];
    button.textContent = on ? "★ marked" : "☆ mark";
    button.setAttribute("aria-pressed", String(on));
    button.setAttribute("aria-label", `${button.textContent}: vector ${name}`);
  }
  function showMarks() {
    at("marked").hidden = marks.size === 0;
    at("marked").querySelector("ul").replaceChildren(...[...marks].map(([anchor, name]) => {
      const d = numberOf.get(anchor), field = make("input", { value: name, placeholder: "name", size: 24 });
      field.setAttribute("aria-label", `name of vector ${V.name[d]}`);
      field.addEventListener("input", () => { marks.set(anchor, field.value); keepMarks(); });
      return make("li", {}, link(d), " ", field, " ", markButton(anchor), " ", make("span", { className: "text" }, V.text[d] < 0 ? "" : seen(D.texts[V.text[d]].slice(0, 100))));
    }));
    document.querySelectorAll("button.mark").forEach(dress);
    if (at("vector-filters").elements.marked.checked) vectors.filter();
  }
  at("export").addEventListener("click", () => {
    const said = [...marks].map(([anchor, name]) => {
      const d = numberOf.get(anchor);
      return { name, trial: V.trial[d], vector: V.vector[d], sign: V.sign[d], group: V.group[d] < 0 ? null : groups[V.group[d]], example: V.text[d] < 0 ? null : D.texts[V.text[d]] };
    });
    const data = new Blob([JSON.stringify({ page: document.title, marks: said }, null, 1)], { type: "application/json" });
    const save = make("a", { href: URL.createObjectURL(data), download: "marked-vectors.json" });
    save.click();
    setTimeout(() => URL.revokeObjectURL(save.href), 1000);
  });
  at("unmark").addEventListener("click", () => { marks.clear(); keepMarks(); showMarks(); });

  // the table of vectors
  const vectorFields = at("vector-filters").elements;
  const measures = Object.entries(V.measures).map(([name, values]) => ({
    name: { relative_radius: "share of the norm", source_layer: "source", target_layer: "target", entropy_change: "entropy change", kl: "KL" }[name] ?? name,
    label: name.replaceAll("_", " "), number: true, value: i => values[i],
    cell: i => name === "changed" && values[i] !== null ? `${Math.round(100 * values[i])}\u00a0%` : short(values[i]),
  }));
  const vectors = table(at("vector-table"), at("vector-pages"), "directions", [
    { name: "vector", value: i => V.trial[i] * 1e6 + V.vector[i], cell: link },
    { name: "mark", cell: i => markButton(V.anchor[i]) },
    { name: "for example", className: "text", cell: i => V.text[i] < 0 ? "" : make("span", { dir: "auto" }, seen(D.texts[V.text[i]].slice(0, 120))) },
    { name: "group", value: i => V.group[i] < 0 ? null : V.group[i], cell: i => groupCell(V.group[i]) },
    { name: "does", value: i => V.kind[i], cell: i => V.kind[i] },
    ...measures,
  ], V.name.map((_, i) => i).sort((i, j) => (V.group[i] < 0) - (V.group[j] < 0) || V.group[i] - V.group[j]), () => {
    const search = vectorFields.search.value.toLowerCase().trim(), kind = vectorFields.kind.value, group = vectorFields.group.value;
    return i => (kind === "" || V.kind[i] === kind) && (group === "" || String(V.group[i]) === group)
      && (!vectorFields.marked.checked || marks.has(V.anchor[i]))
      && (search === "" || V.name[i].startsWith(search) || (V.text[i] >= 0 && lower[V.text[i]].includes(search)));
  });
  const listen = (form, then) => {
    form.addEventListener("submit", event => event.preventDefault());
    form.addEventListener("input", then);
    form.addEventListener("reset", () => setTimeout(then));
  };
  listen(at("vector-filters"), vectors.filter);

  // the table of completions
  const fields = at("filters").elements, value = name => fields[name]?.value ?? "";
  const scales = new Set(R.scale).size > 2, judged = R.natural.some(n => n !== null);
  const named = text => D.shown[text] ?? [];
  const completions = table(at("table"), at("pages"), "completions", [
    { name: "prompt", label: "prompt", number: true, value: i => R.prompt[i], cell: i => short(R.prompt[i]), off: () => D.prompts.length < 2 },
    { name: "kind", value: i => R.kind[i], cell: i => KINDS[R.kind[i]] },
    { name: "vector", value: i => R.direction[i], cell: i => R.direction[i] < 0 ? "" : R.kind[i] === 1 ? link(R.direction[i]) : V.name[R.direction[i]] },
    { name: "scale", label: "scale", number: true, value: i => R.scale[i], cell: i => R.kind[i] ? short(R.scale[i]) : "", off: () => !scales },
    { name: "change", value: i => R.change[i], cell: i => R.kind[i] ? CHANGES[R.change[i]] : "" },
    { name: "group", value: i => R.group[i] < 0 ? null : R.group[i], cell: i => groupCell(R.group[i]) },
    { name: "behaviour", cell: i => make("span", {}, ...named(R.text[i]).map(b => make("span", { className: "tag" }, seen(D.behaviors[b].slice(0, 60))))), off: () => !D.behaviors.length },
    { name: "nats a token", label: "nats a token", number: true, value: i => R.natural[i] === null ? null : -R.natural[i], cell: i => nats(R.natural[i]), off: () => !judged },
    { name: "unsteered", label: "unsteered", className: "text beside", cell: i => { const t = plain.get(`${R.prompt[i]} ${R.sample[i]}`) ?? plain.get(`${R.prompt[i]} 0`); return t === undefined ? "" : longText(D.texts[t]); }, off: () => !fields.beside.checked },
    { name: "text", className: "text", value: i => lower[R.text[i]], cell: i => longText(D.texts[R.text[i]]) },
  ], R.kind.map((_, i) => i), () => {
    const search = value("search").toLowerCase(), behavior = value("behavior"), vector = value("vector").replace(/\s/g, "").replace("-", "−");
    const equal = [["kind", R.kind], ["change", R.change], ["group", R.group], ["prompt", R.prompt]].filter(([name]) => value(name) !== "").map(([name, column]) => [Number(value(name)), column]);
    const sign = value("sign"), hits = search === "" ? null : new Set(lower.flatMap((text, t) => text.includes(search) ? [t] : []));
    const names = V.name.map(name => name.replace(/\s/g, ""));
    const mine = vector === "" ? null : new Set(names.flatMap((name, d) => name === vector || name.slice(0, -1) === vector ? [d] : []));
    return i => equal.every(([wanted, column]) => column[i] === wanted)
      && (hits === null || hits.has(R.text[i])) && (mine === null || mine.has(R.direction[i]))
      && (sign === "" || (R.direction[i] >= 0 && String(V.sign[R.direction[i]]) === sign))
      && (behavior === "" || (behavior === "any" ? named(R.text[i]).length > 0 : behavior === "none" ? !named(R.text[i]).length : named(R.text[i]).includes(Number(behavior))));
  });
  listen(at("filters"), completions.filter);

  // where the address leads: to a part of the page, or to the completions of one direction
  function go() {
    if (!readMarks() && marks.size) keepMarks();
    showMarks();
    const d = numberOf.get(place());
    if (d !== undefined) {
      at("filters").reset();
      fields.vector.value = V.name[d].replace(/\s/g, "");
      fields.beside.checked = true;
      setTimeout(() => { completions.filter(); at("completions").scrollIntoView(); });
      return;
    }
    const target = place() && at(place());
    if (!target) return;
    for (let part = target; part; part = part.parentElement) if (part instanceof HTMLDetailsElement) part.open = true;
    target.scrollIntoView();
  }
  addEventListener("hashchange", go);
  for (const card of document.querySelectorAll("article.card")) {
    const first = card.querySelector(".said a");
    if (first) card.prepend(markButton(first.hash.slice(1)));
  }
  if (at("plane")) drawMap(V, D, groupName, color);
  go();
  document.documentElement.dataset.ready = "yes";
}

function drawMap(V, D, groupName, color) {
  const box = at("plane"), canvas = box.querySelector("canvas"), tip = at("tip"), context = canvas.getContext("2d");
  const points = V.x.map((_, i) => i).filter(i => V.x[i] !== null);
  const [xs, ys] = [V.x, V.y].map(column => points.map(i => column[i]));
  const least = column => column.reduce((a, b) => Math.min(a, b), Infinity), most = column => column.reduce((a, b) => Math.max(a, b), -Infinity);
  const ends = [least(xs), most(xs), least(ys), most(ys)];
  // points at one place are spread a little, so that each can be seen
  const crowd = new Map(), key = i => `${V.x[i].toFixed(3)} ${V.y[i].toFixed(3)}`;
  points.forEach(i => crowd.set(key(i), (crowd.get(key(i)) ?? 0) + 1));
  const before = new Map(), shift = points.map(i => {
    const k = before.get(key(i)) ?? 0, r = Math.min(2.6, 44 / Math.sqrt(crowd.get(key(i)))) * Math.sqrt(k);
    before.set(key(i), k + 1);
    return [r * Math.cos(2.4 * k), r * Math.sin(2.4 * k)];
  });
  const rank = i => V.group[i] >= 0 ? 2 : V.kind[i] === "noise" ? 1 : 0;
  const order = points.map((_, p) => p).sort((p, q) => rank(points[p]) - rank(points[q]) || V.group[points[q]] - V.group[points[p]]);
  let spots = [], chosen = -1, only = null;
  // groups without a colour of their own share an entry of the legend, and what belongs to none has one for each kind
  const keyOf = i => V.group[i] >= 0 ? Math.min(V.group[i], D.n_colors) : { noise: -1, nothing: -2 }[V.kind[i]] ?? null;
  const belongs = i => only === null || keyOf(i) === only;
  function draw() {
    const { width, height } = box.getBoundingClientRect(), ratio = devicePixelRatio || 1, pad = 52;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const scale = (value, low, high, size) => high > low ? pad + (value - low) / (high - low) * (size - 2 * pad) : size / 2;
    spots = points.map((i, p) => [scale(V.x[i], ends[0], ends[1], width) + shift[p][0], height - scale(V.y[i], ends[2], ends[3], height) + shift[p][1]]);
    for (const p of order) {
      const i = points[p], [x, y] = spots[p];
      context.globalAlpha = belongs(i) ? V.kind[i] === "nothing" ? .35 : .85 : .07;
      context.fillStyle = context.strokeStyle = color(V.group[i]);
      context.beginPath();
      context.arc(x, y, V.group[i] >= 0 ? 4.5 : 2.5, 0, 7);
      if (V.group[i] < 0 && V.kind[i] === "noise") context.stroke(); else context.fill();
    }
    context.globalAlpha = 1;
    if (chosen >= 0) {
      context.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--ink");
      context.lineWidth = 2;
      context.beginPath();
      context.arc(...spots[chosen], 8, 0, 7);
      context.stroke();
      context.lineWidth = 1;
    }
  }
  function choose(p, aloud) {
    chosen = p;
    draw();
    tip.hidden = p < 0;
    if (p < 0) return;
    const i = points[p], said = [`vector ${V.name[i]}`, groupName(V.group[i]) || V.kind[i], V.text[i] < 0 ? "" : seen(D.texts[V.text[i]].slice(0, 160))].filter(Boolean);
    tip.replaceChildren(make("b", {}, said[0]), make("br"), said[1] ?? "", make("br"), make("span", { className: "text", dir: "auto" }, said[2] ?? ""));
    const [x, y] = spots[p], { width, height } = box.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(x + 12, width - tip.offsetWidth - 6))}px`;
    tip.style.top = `${y + tip.offsetHeight + 16 > height ? Math.max(4, y - tip.offsetHeight - 12) : y + 12}px`;
    if (aloud) at("point").textContent = said.join("; ");
  }
  function follow() {
    if (chosen < 0) return;
    const i = points[chosen];
    location.hash = V.group[i] >= 0 && V.group[i] < D.cards ? `group-${V.group[i]}` : V.anchor[i];
  }
  function nearest(event) {
    const { left, top } = box.getBoundingClientRect(), x = event.clientX - left, y = event.clientY - top;
    let best = -1, near = 14 ** 2;
    for (const p of order) {
      const d = (spots[p][0] - x) ** 2 + (spots[p][1] - y) ** 2;
      if (d <= near && belongs(points[p])) [best, near] = [p, d];
    }
    return best;
  }
  box.addEventListener("pointermove", event => { const p = nearest(event); if (p !== chosen) choose(p, false); });
  box.addEventListener("pointerleave", () => choose(-1, false));
  box.addEventListener("click", event => { choose(nearest(event), true); follow(); });
  const along = points.map((_, p) => p).sort((p, q) => (V.group[points[p]] + 1e9) % 1e9 - (V.group[points[q]] + 1e9) % 1e9 || V.x[points[p]] - V.x[points[q]]);
  box.addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Enter") follow();
    else if (event.key === "Escape") choose(-1, false);
    else if (step) {
      const mine = along.filter(p => belongs(points[p])), now = mine.indexOf(chosen);
      if (mine.length) choose(mine[(now + step + mine.length) % mine.length], true);
    } else return;
    event.preventDefault();
  });
  const counted = new Map();
  for (const i of points) {
    const key = keyOf(i);
    if (key !== null) counted.set(key, (counted.get(key) ?? 0) + 1);
  }
  const keys = [...counted.keys()].sort((a, b) => (a < 0) - (b < 0) || (a < 0 ? b - a : a - b));
  const nameOf = key => key === D.n_colors ? "other groups" : key >= 0 ? groupName(key).slice(0, 40) : key === -1 ? "noise" : "nothing";
  at("legend").append(...keys.map(key => {
    const dot = make("span", { className: `dot${key < 0 ? ` ${nameOf(key)}` : ""}` }), button = make("button", { type: "button" }, dot, `${nameOf(key)} (${counted.get(key)})`);
    dot.style.setProperty("--dot", color(key));
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => {
      only = only === key ? null : key;
      at("legend").querySelectorAll("button").forEach((other, k) => other.setAttribute("aria-pressed", String(keys[k] === only)));
      choose(-1, false);
    });
    return button;
  }));
  new ResizeObserver(draw).observe(box);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
}

main();
