"use strict";
// One page without a build step. Options come from /v1/options; images from jobs, followed by their events.

const byId = (id) => document.getElementById(id);
const MAIN = ["num_inference_steps", "guidance_scale", "seed", "width", "height", "sampler", "strength"];
const OWN = ["negative_prompt"]; // have fields of their own
const HISTORY = "latentsmith-history";
const KEPT = 60; // of the history
const THUMBNAIL = 128; // pixels
let table = [];
let running = [];
let startImage = null;

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function say(text, bad = false) {
  byId("status").textContent = text;
  byId("status").className = bad ? "bad" : "";
}

async function call(path, options = {}) {
  const key = byId("key").value;
  const headers = { ...(options.headers || {}), ...(key ? { authorization: `Bearer ${key}` } : {}) };
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer;
  if (answer.status === 401) byId("key-box").open = true;
  const found = await answer.json().catch(() => ({}));
  throw new Error(found.detail || `status ${answer.status}`);
}

const post = (path, body) =>
  call(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });

// ---- the form

function field(option) {
  const label = element("label", { title: option.help }, option.name.replaceAll("_", " "));
  let input;
  if (option.choices.length) {
    input = element("select", {}, ...option.choices.map((each) => element("option", { value: each }, each)));
  } else if (option.type === "bool") {
    input = element("input", { type: "checkbox" });
  } else if (option.type === "str") {
    input = element("input", { type: "text", placeholder: option.default ?? "" });
  } else {
    input = element("input", { type: "number", step: option.type === "int" ? 1 : "any" });
    if (option.low !== null) input.min = option.name === "seed" ? -1 : option.low;
    if (option.high !== null && option.high < 2 ** 53) input.max = option.high;
    input.placeholder = option.name === "seed" ? "random" : (option.default ?? "");
  }
  input.id = option.name;
  label.append(input);
  return label;
}

function settings() {
  const found = { prompt: byId("prompt").value, model: byId("model").value };
  found.num_images_per_prompt = Number(byId("num_images_per_prompt").value);
  if (byId("negative_prompt").value) found.negative_prompt = byId("negative_prompt").value;
  for (const option of table) {
    const input = byId(option.name);
    if (OWN.includes(option.name)) continue;
    if (option.type === "bool") { if (input.checked) found[option.name] = true; }
    else if (input.value !== "") found[option.name] = option.type === "str" ? input.value : Number(input.value);
  }
  return found;
}

function restore(given) {
  for (const [name, value] of Object.entries(given)) {
    const input = byId(name);
    if (!input || value === null || typeof value === "object") continue;
    if (input.type === "checkbox") input.checked = Boolean(value); else input.value = value;
  }
}

async function begin() {
  const [options, models] = await Promise.all([call("/v1/options"), call("/v1/models")]);
  table = await options.json();
  for (const option of table.filter((each) => !OWN.includes(each.name))) {
    byId(MAIN.includes(option.name) ? "main-options" : "more-options").append(field(option));
  }
  for (const { id } of (await models.json()).data) {
    byId("model").append(element("option", { value: id }, id));
    byId("other").append(element("option", { value: id }, id));
  }
  for (const select of document.querySelectorAll(".axis")) {
    select.append(element("option", { value: "" }, "none"));
    for (const option of table.filter((each) => each.type !== "bool")) {
      select.append(element("option", { value: option.name }, option.name.replaceAll("_", " ")));
    }
  }
  say("");
}

// ---- jobs

async function follow(job, onState) {
  const answer = await call(`/v1/jobs/${job.id}/events`);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const data = event.split("\n").find((line) => line.startsWith("data: "));
      if (data) onState(JSON.parse(data.slice(6)));
    }
  }
}

async function generate(given, where) {
  const bar = element("progress", { max: 1, value: 0 });
  const preview = element("img", { alt: "preview", hidden: true });
  const caption = element("figcaption", {}, "waiting");
  const figure = element("figure", {}, preview, bar, caption);
  where.append(figure);
  let state;
  try {
    const job = await (await post("/v1/jobs", { ...given, previews: true })).json();
    running.push(job.id);
    await follow(job, (each) => {
      state = each;
      bar.value = each.steps ? each.step / each.steps : 0;
      if (each.preview) { preview.src = each.preview; preview.hidden = false; }
      const left = each.seconds_left === null ? "" : `, ${Math.ceil(each.seconds_left)} s left`;
      caption.textContent = each.position ? `${each.position} before it` : `step ${each.step} of ${each.steps}${left}`;
    });
    if (state.error) throw new Error(state.error);
    if (!state.images.length) { caption.textContent = state.status; bar.remove(); return; }
  } catch (error) {
    caption.textContent = error.message;
    bar.remove();
    throw error;
  }
  figure.remove();
  for (const [index, path] of state.images.entries()) {
    const blob = await (await call(path)).blob();
    await show(blob, { ...given, seed: state.seeds[index] }, where);
  }
}

async function show(blob, given, where) {
  const url = URL.createObjectURL(blob);
  const image = element("img", { src: url, alt: given.prompt });
  await image.decode();
  if (image.naturalWidth <= THUMBNAIL) image.className = "small";
  const link = element("a", { href: url, download: `seed${given.seed}.png` }, image);
  where.append(element("figure", {}, link, element("figcaption", {}, `${given.model}, seed ${given.seed}`)));
  remember(image, given);
}

async function submit(event) {
  event.preventDefault();
  const given = settings();
  if (given.seed === undefined || given.seed < 0) given.seed = Math.floor(Math.random() * 2 ** 32);
  if (startImage) Object.assign(given, imageAndMask()); else delete given.strength;
  byId("stop").disabled = false;
  byId("go").disabled = true;
  say("");
  try {
    const axes = ["x", "y"].map((axis) => axisOf(axis));
    if (axes.some(Boolean)) await grid(given, axes);
    else await sideBySide(given);
  } catch (error) { say(error.message, true); }
  running = [];
  byId("stop").disabled = true;
  byId("go").disabled = false;
}

async function sideBySide(given) {
  const models = [given.model, byId("other").value].filter(Boolean);
  const rows = models.map(() => element("div", { className: "batch" }));
  byId("results").prepend(...rows);
  const done = await Promise.allSettled(models.map((model, index) => generate({ ...given, model }, rows[index])));
  const failed = done.find((each) => each.status === "rejected");
  if (failed) throw failed.reason;
}

function axisOf(axis) {
  const name = byId(`axis-${axis}`).value;
  const values = byId(`values-${axis}`).value.split(",").map((each) => each.trim()).filter(Boolean);
  if (!name || !values.length) return null;
  const text = table.find((each) => each.name === name).type === "str";
  return { name, values: values.map((each) => (text ? each : Number(each))) };
}

async function grid(given, [across, down]) {
  const rows = down ? down.values : [null];
  const columns = across ? across.values : [null];
  const body = element("table");
  const head = element("tr", {}, element("th"));
  columns.forEach((each) => head.append(element("th", {}, across ? `${across.name} ${each}` : "")));
  body.append(head);
  const jobs = [];
  for (const row of rows) {
    const line = element("tr", {}, element("th", {}, down ? `${down.name} ${row}` : ""));
    for (const column of columns) {
      const cell = element("td");
      line.append(cell);
      const own = { ...given, num_images_per_prompt: 1 };
      if (across) own[across.name] = column;
      if (down) own[down.name] = row;
      jobs.push(() => generate(own, cell));
    }
    body.append(line);
  }
  byId("results").prepend(element("div", { className: "table" }, body));
  const done = await Promise.allSettled(jobs.map((job) => job()));
  const failed = done.find((each) => each.status === "rejected");
  if (failed) throw failed.reason;
}

// ---- the image to start from, and its mask

function setImage(image) {
  startImage = image;
  const canvas = byId("mask");
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  canvas.hidden = false;
  canvas.painted = document.createElement("canvas");
  canvas.painted.width = canvas.width;
  canvas.painted.height = canvas.height;
  redraw();
}

function redraw() {
  const canvas = byId("mask");
  const context = canvas.getContext("2d");
  context.globalAlpha = 1;
  context.drawImage(startImage, 0, 0);
  context.globalAlpha = 0.6;
  context.drawImage(canvas.painted, 0, 0);
}

function paint(event) {
  if (!event.buttons || !startImage) return;
  const canvas = byId("mask");
  const box = canvas.getBoundingClientRect();
  const scale = canvas.width / box.width;
  const context = canvas.painted.getContext("2d");
  context.fillStyle = "white";
  context.beginPath();
  context.arc((event.clientX - box.left) * scale, (event.clientY - box.top) * scale, (byId("brush").value * scale) / 2, 0, 7);
  context.fill();
  canvas.used = true;
  redraw();
}

function pngOf(draw) {
  const canvas = document.createElement("canvas");
  canvas.width = startImage.naturalWidth;
  canvas.height = startImage.naturalHeight;
  const context = canvas.getContext("2d");
  context.fillStyle = "black";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(draw, 0, 0);
  return canvas.toDataURL("image/png");
}

function imageAndMask() {
  const canvas = byId("mask");
  return { image: pngOf(startImage), ...(canvas.used ? { mask_image: pngOf(canvas.painted) } : {}) };
}

function loadImage(file) {
  const image = new Image();
  image.onload = () => { byId("mask").used = false; setImage(image); };
  image.onerror = () => say(`${file.name}: not an image that this browser reads`, true);
  image.src = URL.createObjectURL(file);
}

// ---- settings of a PNG, and history

async function metadataOf(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  const view = new DataView(bytes.buffer);
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const type = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    if (type === "tEXt") {
      const text = new TextDecoder("latin1").decode(bytes.subarray(at + 8, at + 8 + length));
      if (text.startsWith("latentsmith\0")) return JSON.parse(text.slice(12));
    }
    at += length + 12;
  }
  throw new Error(`${file.name}: does not record how it was made`);
}

async function drop(event) {
  event.preventDefault();
  const file = event.dataTransfer.files[0];
  if (!file) return;
  try {
    const found = await metadataOf(file);
    restore({ ...found.options, ...found, model: found.model.from, num_images_per_prompt: 1 });
    say(`settings of ${file.name}`);
  } catch (error) { say(error.message, true); }
}

const remembered = () => JSON.parse(localStorage.getItem(HISTORY) || "[]");

function remember(image, given) {
  const canvas = document.createElement("canvas");
  const scale = Math.min(1, THUMBNAIL / Math.max(image.naturalWidth, image.naturalHeight));
  canvas.width = Math.max(1, image.naturalWidth * scale);
  canvas.height = Math.max(1, image.naturalHeight * scale);
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  const { image: _, mask_image: __, ...kept } = given;
  try {
    localStorage.setItem(HISTORY, JSON.stringify([{ given: kept, thumbnail: canvas.toDataURL("image/jpeg", 0.8) }, ...remembered()].slice(0, KEPT)));
  } catch { localStorage.removeItem(HISTORY); } // the browser's space is full
  showHistory();
}

function showHistory() {
  byId("history").replaceChildren(...remembered().map(({ given, thumbnail }) => {
    const again = element("button", { type: "button", title: given.prompt }, `again, seed ${given.seed}`);
    again.onclick = () => { restore({ ...given, num_images_per_prompt: 1 }); window.scrollTo(0, 0); };
    return element("figure", {}, element("img", { src: thumbnail, alt: given.prompt }), again);
  }));
}

byId("form").addEventListener("submit", submit);
byId("stop").onclick = () => running.forEach((id) => call(`/v1/jobs/${id}`, { method: "DELETE" }).catch(() => {}));
byId("image").onchange = (event) => event.target.files[0] && loadImage(event.target.files[0]);
byId("unmask").onclick = () => { if (startImage) { byId("mask").used = false; setImage(startImage); } };
byId("unimage").onclick = () => { startImage = null; byId("mask").hidden = true; byId("image").value = ""; };
byId("mask").addEventListener("pointerdown", paint);
byId("mask").addEventListener("pointermove", paint);
byId("forget").onclick = () => { localStorage.removeItem(HISTORY); showHistory(); };
byId("key").onchange = () => { if (!table.length) begin().catch((error) => say(error.message, true)); };
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", drop);
showHistory();
begin().catch((error) => say(error.message, true));
