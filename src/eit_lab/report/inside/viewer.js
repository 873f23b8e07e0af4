"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const element = (id) => document.getElementById(id);
  const facts = JSON.parse(element("facts").textContent);
  const [rows, columns] = facts.grid;
  const [height, width] = facts.size;
  const [down, across] = facts.pitch;
  const num = { layers: facts.layers.length, heads: facts.heads, queries: facts.queries.length, tokens: rows * columns };

  // ------------------------------------------------------------------------------------------------ numbers of one image

  function bytes(id) {
    const text = element(id).textContent;
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
    const raw = atob(text);
    const out = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
    return out;
  }

  /** float16, little endian: not every browser has Float16Array. */
  function halves(id) {
    const raw = bytes(id);
    const out = new Float32Array(raw.length / 2);
    for (let i = 0; i < out.length; i++) {
      const bits = raw[2 * i] | (raw[2 * i + 1] << 8);
      const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
      if (exponent === 0) out[i] = sign * fraction * 2 ** -24;
      else if (exponent === 31) out[i] = fraction ? NaN : sign * Infinity;
      else out[i] = sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
    }
    return out;
  }

  function unpack(image) {
    const of = (name, read) => (element(`${name}-${image}`) ? read(`${name}-${image}`) : null);
    return {
      input: of("input_spectrum", halves), tokens: of("token_spectrum", halves), rollout: of("rollout", halves),
      attention: of("attention", bytes), peak: of("attention_max", halves), cls: of("cls_mass", halves),
    };
  }

  const part = (array, place, length) => array.subarray(place * length, (place + 1) * length);

  /** The map of one head: its values (tokens of the grid), its largest value, the mass on CLS. */
  function head(layer, number, query) {
    const place = (layer * num.heads + number) * num.queries + query;
    const peak = now.peak[place];
    const values = Float32Array.from(part(now.attention, place, num.tokens), (v) => (v / 255) * peak);
    return { values, peak, cls: now.cls[place] };
  }

  /** Smallest and largest of the finite values; `cut` is the share of the lowest that is left out. */
  function limits(values, cut = 0) {
    const finite = Float32Array.from(values).filter(Number.isFinite).sort();
    return finite.length ? [finite[Math.floor(cut * (finite.length - 1))], finite[finite.length - 1]] : [0, 0];
  }

  /** Mean over rings of equal radius about the middle: [radius in units of pi, value], inwards first. */
  function rings(values) {
    const num = Math.max(rows, columns), sums = [];
    for (let i = 0; i < rows; i++) {
      for (let j = 0; j < columns; j++) {
        const radius = 2 * Math.hypot((i - (rows >> 1)) / rows, (j - (columns >> 1)) / columns);
        const ring = (sums[Math.round((radius * num) / 2)] ??= [0, 0, 0]);
        ring[0] += radius; ring[1] += values[i * columns + j]; ring[2] += 1;
      }
    }
    return sums.filter(Boolean).map(([radius, sum, count]) => [radius / count, sum / count]);
  }

  function said(value) {
    if (!Number.isFinite(value)) return "–";
    const text = value !== 0 && Math.abs(value) < 1e-4 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
    return text.replace("-", "\u2212");
  }

  /** In as few characters as a small map has room for. */
  function brief(value) {
    if (!Number.isFinite(value)) return "–";
    if (value > 0 && value < 1e-4) return value.toExponential(0).replace("-", "\u2212");
    if (value < 0.001) return value.toFixed(4).replace(/^0/, "");
    return value >= 0.995 ? value.toFixed(2) : value.toPrecision(2).replace(/^0/, "");
  }

  // ------------------------------------------------------------------------------------------------------------- drawing

  const colours = bytes("colours");

  /** One pixel a value; what is not a number is left out. The limits of the colours stay on the canvas. */
  function paint(canvas, values, [tall, wide], [low, high]) {
    if (canvas.width !== wide) canvas.width = wide;
    if (canvas.height !== tall) canvas.height = tall;
    canvas.dataset.low = low;
    canvas.dataset.high = high;
    // Kept off the GPU, which is not made for two hundred canvases of a few pixels.
    const context = canvas.getContext("2d", { willReadFrequently: true });
    const drawn = context.createImageData(wide, tall);
    const scale = high > low ? 255 / (high - low) : 0;
    for (let i = 0; i < wide * tall; i++) {
      if (!Number.isFinite(values[i])) continue;
      const k = 3 * Math.max(0, Math.min(255, Math.round((values[i] - low) * scale)));
      drawn.data.set([colours[k], colours[k + 1], colours[k + 2], 255], 4 * i);
    }
    context.putImageData(drawn, 0, 0);
  }

  function bar(id, [low, high]) {
    const of = element(id);
    paint(of.querySelector("canvas"), Float32Array.from({ length: 256 }, (_, i) => i), [1, 256], [0, 255]);
    of.querySelector(".low").textContent = said(low);
    of.querySelector(".high").textContent = said(high);
  }

  function draw(parent, name, attributes, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return parent.appendChild(made);
  }

  // Where the stem pads an image that its pitch does not divide, the grid is larger than the image, half of it on either side.
  const left = (1 - (columns * across) / width) / 2, top = (1 - (rows * down) / height) / 2;
  const step = { x: across / width, y: down / height };

  function dressed(stage, { grid, queries }) {
    const svg = stage.querySelector("svg");
    if (grid) {
      let d = "";
      for (let i = 0; i <= rows; i++) d += `M${left} ${top + i * step.y}h${columns * step.x}`;
      for (let j = 0; j <= columns; j++) d += `M${left + j * step.x} ${top}v${rows * step.y}`;
      draw(svg, "path", { class: "line-dark", d });
      draw(svg, "path", { class: "line-light", d });
    }
    if (!queries) return;
    facts.queries.forEach((query, place) => {
      if (query === 0) return;
      const [i, j] = cell(query);
      const group = draw(svg, "g", { "data-query": place });
      const [cx, cy] = [left + (j + 0.5) * step.x, top + (i + 0.5) * step.y];
      const round = (share) => ({ cx, cy, rx: share * step.x, ry: share * step.y });
      for (const name of ["query-rim", "query-dot"]) draw(group, "path", { class: name, d: `M${cx} ${cy}h0` });
      draw(group, "ellipse", { class: "query-dark", ...round(0.4) });
      draw(group, "ellipse", { class: "query-light", ...round(0.4) });
    });
  }

  const cell = (query) => [Math.floor((query - 1) / columns), (query - 1) % columns];
  const named = (query) => (query === 0 ? "CLS" : `row ${cell(query)[0]}, column ${cell(query)[1]}`);

  /** The token under the pointer, as [row, column] with fractions; 0.5 is the middle of the first. */
  function under(stage, event) {
    const box = stage.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
    return [(y - top) / step.y, (x - left) / step.x];
  }

  // --------------------------------------------------------------------------------------------------------------- state

  const chosen = { image: 0, point: 0, query: 0, layer: num.layers - 1, head: 0 };
  let now = null; // the arrays of the chosen image
  let shown = null; // the map that is large
  let largest = 0; // of all maps of this image and query

  function showImage() {
    const { index, label, predicted, right } = facts.images[chosen.image];
    now = unpack(chosen.image);
    element("title").textContent = `Image ${index}: ${label}, ${right ? "classified rightly" : `taken for ${predicted}`}`;
    const thumb = document.querySelectorAll(".thumb")[chosen.image], strip = thumb.parentNode;
    strip.scrollLeft = thumb.offsetLeft - (strip.clientWidth - thumb.offsetWidth) / 2; // on a narrow page it is one line
    const source = thumb.querySelector("img").src;
    for (const image of document.querySelectorAll(".stage img")) image.src = source;
    if (now.input) {
      const range = limits(now.input);
      paint(element("input").querySelector("canvas"), now.input, facts.frequencies, range);
      bar("input-bar", range);
    }
    if (now.rollout) {
      const range = limits(now.rollout);
      paint(element("rollout").querySelector("canvas"), now.rollout, facts.grid, range);
      bar("rollout-bar", range);
    }
    showSpectra();
    showMaps();
  }

  function showSpectra() {
    if (!now.tokens) return;
    const relative = element("relative").checked;
    const spectra = facts.points.map((_, place) => {
      const values = part(now.tokens, place, num.tokens);
      const zero = relative ? values[(rows >> 1) * columns + (columns >> 1)] : 0;
      return values.map((v) => v - zero);
    });
    const all = new Float32Array(spectra.length * num.tokens);
    spectra.forEach((values, place) => all.set(values, place * num.tokens));
    const range = limits(all, 0.01);
    const tiles = document.querySelectorAll(".tile canvas");
    spectra.forEach((values, place) => paint(tiles[place], values, facts.grid, range));
    bar("tokens-bar", range);
    showProfile(spectra.map(rings), relative);
  }

  /** Numbers that people count in, four to seven of them, inside [low, high]. */
  function ticks(low, high) {
    if (!(high > low)) return [low];
    const raw = (high - low) / 5, power = 10 ** Math.floor(Math.log10(raw));
    const size = [1, 2, 5, 10].find((m) => m * power >= raw * 0.99) * power;
    const out = [];
    for (let n = Math.ceil(low / size - 1e-9); n * size <= high + 1e-9 * size; n++) out.push(n * size);
    return out;
  }

  function showProfile(curves, relative) {
    const svg = element("profile");
    svg.replaceChildren();
    const [x0, x1, y0, y1] = [58, 448, 276, 12];
    const values = curves.flatMap((curve) => curve.map(([, v]) => v)).filter(Number.isFinite);
    let [low, high] = limits(values);
    if (!(high > low)) [low, high] = [low - 1, high + 1];
    const end = Math.max(...curves[0].map(([r]) => r), 1);
    const x = (r) => x0 + (r / end) * (x1 - x0);
    const y = (v) => y0 + ((v - low) / (high - low)) * (y1 - y0);
    for (const v of ticks(low, high)) {
      draw(svg, "line", { class: "rule", x1: x0, x2: x1, y1: y(v), y2: y(v) });
      draw(svg, "text", { x: x0 - 7, y: y(v) + 4, "text-anchor": "end" }, said(v));
    }
    for (const r of [0, 0.25, 0.5, 0.75, 1, 1.25]) {
      if (r > end) continue;
      draw(svg, "line", { class: "axis", x1: x(r), x2: x(r), y1: y0, y2: y0 + 5 });
      draw(svg, "text", { x: x(r), y: y0 + 20, "text-anchor": "middle" }, r === 0 ? "0" : r === 1 ? "π" : `${r}π`);
    }
    draw(svg, "path", { class: "axis", d: `M${x0} ${y1}V${y0}H${x1}` });
    draw(svg, "text", { x: (x0 + x1) / 2, y: y0 + 42, "text-anchor": "middle" }, "radius of frequency on the token grid");
    const axis = relative ? "log amplitude minus that of frequency 0" : "log amplitude";
    draw(svg, "text", { transform: `translate(14 ${(y0 + y1) / 2}) rotate(-90)`, "text-anchor": "middle" }, axis);
    curves.forEach((curve, place) => {
      const points = curve.filter(([, v]) => Number.isFinite(v)).map(([r, v]) => `${x(r).toFixed(2)} ${y(v).toFixed(2)}`);
      const path = draw(svg, "path", { "data-point": place, "data-values": JSON.stringify(curve), d: points.length ? `M${points.join("L")}` : "" });
      path.style.setProperty("--depth", `${(100 * place) / Math.max(1, curves.length - 1)}%`);
      draw(path, "title", {}, facts.points[place]);
    });
    markPoint(chosen.point);
  }

  function markPoint(point) {
    const svg = element("profile");
    for (const path of svg.querySelectorAll("[data-point]")) path.classList.toggle("chosen", Number(path.dataset.point) === point);
    const path = svg.querySelector(`[data-point="${point}"]`);
    if (path) svg.append(path); // above the others
    element("point-said").textContent = `Thick: ${facts.points[point]}.`;
  }

  /** The limits of a map's colours. */
  function scaled(values, peak, most) {
    return { zero: [0, peak], least: limits(values), all: [0, most] }[element("scale").value];
  }

  function showMaps() {
    if (!num.layers) return;
    const cells = [...document.querySelectorAll("#maps button")].map((button) => ({
      button, ...head(Number(button.dataset.layer), Number(button.dataset.head), chosen.query),
    }));
    const most = Math.max(0, ...cells.map(({ peak }) => peak).filter(Number.isFinite));
    for (const { button, values, peak, cls } of cells) {
      paint(button.querySelector("canvas"), values, facts.grid, scaled(values, peak, most));
      button.querySelector(".peak").textContent = `≤${brief(peak)}`;
      const mass = button.querySelector(".mass");
      mass.textContent = `CLS ${Number.isFinite(cls) ? cls.toFixed(2).replace(/^0/, "") : "–"}`;
      mass.style.setProperty("--share", `${100 * Math.max(0, Math.min(1, cls || 0))}%`);
      const { layer, head: number } = button.dataset;
      const text = `Layer ${facts.layers[layer]}, head ${number}: largest value ${said(peak)}, mass on CLS ${said(cls)}`;
      button.title = text;
      button.setAttribute("aria-label", text);
    }
    bar("maps-bar", [0, most]);
    const [low, high] = { zero: ["0", "its largest value"], least: ["its least", "its largest value"], all: ["0", said(most)] }[element("scale").value];
    element("maps-bar").querySelector(".low").textContent = low;
    element("maps-bar").querySelector(".high").textContent = high;
    largest = most;
    for (const group of document.querySelectorAll("[data-query]")) group.classList.toggle("chosen", Number(group.dataset.query) === chosen.query);
    markMap();
  }

  function markMap() {
    for (const button of document.querySelectorAll("#maps button")) {
      const is = Number(button.dataset.layer) === chosen.layer && Number(button.dataset.head) === chosen.head;
      button.setAttribute("aria-pressed", is);
      button.tabIndex = is ? 0 : -1;
    }
    showMap(chosen.layer, chosen.head);
  }

  function showMap(layer, number) {
    shown = head(layer, number, chosen.query);
    const range = scaled(shown.values, shown.peak, largest);
    paint(element("map").querySelector("canvas"), shown.values, facts.grid, range);
    bar("map-bar", range);
    const query = named(facts.queries[chosen.query]);
    element("map-said").textContent = `Layer ${facts.layers[layer]}, head ${number}, query ${query}: largest value ${said(shown.peak)}, mass on CLS ${said(shown.cls)}`;
  }

  // -------------------------------------------------------------------------------------------------------- what people do

  function choose(change) {
    const before = { ...chosen };
    Object.assign(chosen, change);
    if (chosen.image !== before.image) showImage();
    else if (chosen.query !== before.query) showMaps();
    else if (chosen.layer !== before.layer || chosen.head !== before.head) markMap();
    if (chosen.point !== before.point) markPoint(chosen.point);
    if (num.queries) element("query").value = chosen.query;
    for (const name of ["image", "point"]) {
      const input = document.querySelector(`input[name="${name}"][value="${chosen[name]}"]`);
      if (input) input.checked = true;
    }
  }

  /** #image=3, and query=0&layer=2&head=1 where they are said: a token of the grid (0 is CLS), a layer and a head by number. */
  function fromAddress() {
    const asked = new URLSearchParams(location.hash.slice(1));
    const places = {
      image: (n) => (n < facts.images.length ? n : -1), query: (n) => facts.queries.indexOf(n),
      layer: (n) => facts.layers.indexOf(n), head: (n) => (n < num.heads ? n : -1),
    };
    const change = {};
    for (const [name, place] of Object.entries(places)) {
      const found = /^\d{1,9}$/.test(asked.get(name) ?? "") ? place(Number(asked.get(name))) : -1;
      if (found >= 0) change[name] = found;
    }
    return change;
  }

  function pick(change) {
    choose(change);
    const parts = { image: chosen.image };
    if (num.layers) Object.assign(parts, { query: facts.queries[chosen.query], layer: facts.layers[chosen.layer], head: chosen.head });
    location.replace(`#${new URLSearchParams(parts)}`);
  }

  function nearest(stage, event) {
    const [y, x] = under(stage, event);
    let best = -1, least = Infinity;
    facts.queries.forEach((query, place) => {
      if (query === 0) return;
      const [i, j] = cell(query);
      const distance = Math.hypot((y - i - 0.5) * down, (x - j - 0.5) * across);
      if (distance < least) [best, least] = [place, distance];
    });
    return best;
  }

  function start() {
    const root = document.documentElement;
    const styles = {
      "--aspect": width / height, "--token-aspect": (columns * across) / (rows * down), "--heads": num.heads, "--layers": Math.max(1, num.layers), "--points": facts.points.length,
      "--left": `${100 * left}%`, "--top": `${100 * top}%`,
      "--across": `${100 * columns * step.x}%`, "--down": `${100 * rows * step.y}%`,
    };
    for (const [name, value] of Object.entries(styles)) root.style.setProperty(name, value);
    root.classList.toggle("small", Math.max(height, width) < 100);

    for (const stage of document.querySelectorAll(".stage:not(.spectrum)")) {
      const plain = stage.id === "picked";
      stage.querySelector("canvas").hidden = plain;
      dressed(stage, { grid: plain && facts.on_image, queries: stage.id !== "rollout" });
      if (stage.id === "rollout" || !facts.queries.some((query) => query > 0)) continue;
      stage.classList.add("clickable");
      stage.addEventListener("click", (event) => pick({ query: nearest(stage, event) }));
    }
    for (const badge of document.querySelectorAll(".badge")) badge.addEventListener("click", () => pick({ query: Number(badge.dataset.query) }));
    if (facts.frequencies && facts.on_image) {
      // The token grid's Nyquist frequency is 1 / pitch of the image's own. Frequency 0 is a pixel, half a pixel off the middle if even.
      const [tall, wide] = facts.frequencies;
      const [a, b] = [Math.min(1, 1 / across), Math.min(1, 1 / down)];
      const [x, y] = [((wide >> 1) + 0.5) / wide - a / 2, ((tall >> 1) + 0.5) / tall - b / 2];
      draw(element("input").querySelector("svg"), "rect", { class: "dashed", x, y, width: a, height: b });
    }

    document.addEventListener("change", ({ target }) => {
      if (target.name === "image") pick({ image: Number(target.value) });
      else if (target.id === "query") pick({ query: Number(target.value) });
      else if (target.name === "point") choose({ point: Number(target.value) });
      else if (target.id === "relative") showSpectra();
      else if (target.id === "scale") showMaps();
    });
    document.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (by && event.target === document.body) pick({ image: (chosen.image + by + facts.images.length) % facts.images.length });
    });

    for (const tile of document.querySelectorAll(".tile")) {
      tile.addEventListener("pointerenter", () => markPoint(Number(tile.querySelector("input").value)));
      tile.addEventListener("pointerleave", () => markPoint(chosen.point));
    }

    for (const slide of document.querySelectorAll(".slide input")) {
      const stage = element(slide.dataset.of);
      const set = () => {
        stage.querySelector("canvas").style.opacity = slide.value / 100;
        stage.classList.toggle("veiled", slide.value > 0);
        slide.nextElementSibling.textContent = `${slide.value}%`;
      };
      slide.addEventListener("input", set);
      set();
    }
    for (const read of document.querySelectorAll(".read")) {
      const stage = element(read.dataset.of);
      stage.addEventListener("pointermove", (event) => {
        const [i, j] = under(stage, event).map(Math.floor);
        const values = read.dataset.of === "map" ? shown.values : now.rollout;
        const inside = i >= 0 && i < rows && j >= 0 && j < columns;
        read.textContent = inside ? `Row ${i}, column ${j}: ${said(values[i * columns + j])}` : "";
      });
      stage.addEventListener("pointerleave", () => { read.textContent = ""; });
    }

    const table = element("maps");
    if (table) {
      const place = ({ dataset }) => ({ layer: Number(dataset.layer), head: Number(dataset.head) });
      table.classList.toggle("wide", num.heads <= 6);
      table.addEventListener("click", ({ target }) => {
        const button = target.closest("button");
        if (button) pick(place(button));
      });
      table.addEventListener("pointerover", ({ target, pointerType }) => {
        const button = target.closest("button");
        if (button && pointerType === "mouse") showMap(place(button).layer, place(button).head);
      });
      table.addEventListener("pointerleave", () => showMap(chosen.layer, chosen.head));
      table.addEventListener("keydown", (event) => {
        const [y, x] = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key] ?? [0, 0];
        const to = table.querySelector(`[data-layer="${chosen.layer + y}"][data-head="${chosen.head + x}"]`);
        if (!(x || y)) return;
        event.preventDefault();
        if (!to) return;
        pick(place(to));
        to.focus();
      });
    }
    window.addEventListener("hashchange", () => choose(fromAddress()));
    Object.assign(chosen, fromAddress());
    showImage();
    choose({});
  }

  start();
})();
