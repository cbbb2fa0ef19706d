// The playground's page: a form, its requests, and the resulting pictures.

const MAX_FILE = 15 * 2 ** 20; // bytes; the server takes a little more
const HINTS = {
  sample: "Images from noise. The same seed and settings give the same images.",
  interpolate: "From one picture to another; the two are shown at the ends of the result.",
  vary: "Adds noise to a picture up to t and denoises it again: the larger t, the less is kept.",
  inpaint: "Repaints a part of a picture to fit the rest.",
};

const find = (selector, root = document) => root.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const form = find("#form");
const field = (name) => form.elements.namedItem(name);

let run; // the run's facts, from the server
let running = null; // AbortController of the current request
let ends = []; // pictures shown before and after the results
let frames = []; // the steps from noise to picture: a list of pictures each
let chosen = null; // index of the selected picture
const pictures = { first: null, second: null }; // PNG as data URLs, of the run's size

// ---------------------------------------------------------------------------------------------------- settings

function option(value, text = value) {
  const made = document.createElement("option");
  made.value = value;
  made.textContent = text;
  return made;
}

function limit(name, max, value) {
  field(name).max = max;
  if (value !== undefined) field(name).value = value;
}

function fill() {
  const size = `${run.width}x${run.height}`;
  find("#run").textContent = `${run.name} · ${size} · ${run.weights}`;
  document.title = `${run.name} · ddpm_jax playground`;
  field("sampler").append(...Object.keys(run.samplers).map((name) => option(name)));
  field("sampler").value = run.sampler;
  field("spacing").append(option(""), ...run.spacings.map((name) => option(name)));
  limit("num_steps", run.timesteps, run.num_steps);
  limit("num_images", run.max_images, run.max_images);
  limit("t", run.timesteps - 1, Math.floor(run.timesteps / 2));
  limit("times", run.max_times);
  limit("guidance_scale", run.max_guidance, run.guidance_scale);
  find("#brush").max = Math.max(2, Math.round(Math.min(run.width, run.height) / 4));
  find("#brush").value = Math.max(1, Math.round(Math.min(run.width, run.height) / 10));
  const texts = run.controls.filter(isText).map((control) => labelled(control, textInput(control)));
  texts.forEach((label) => label.classList.add("wide"));
  find(".settings").prepend(...texts);
  for (const control of run.controls.filter((control) => !isText(control))) {
    find("[data-guidance]").before(labelled(control, document.createElement("select")));
  }
  for (const name of ["vary", "inpaint", "interpolate", "interpolate_latents"]) {
    find(`[value=${name}]`).disabled = !run.edits.includes(name);
  }
  for (const button of all(".training")) {
    button.disabled = !run.training_images;
    button.title = run.without_training_images;
  }
}

const isText = (control) => !control.choices.length;

function labelled(control, input) {
  const label = document.createElement("label");
  label.dataset.hide = "arc";
  input.name = control.name;
  label.append(`${control.title} `, input);
  return label;
}

function textInput(control) {
  const input = document.createElement("input");
  input.type = "text";
  input.maxLength = run.max_text;
  if (control.suggestions.length) {
    const list = document.createElement("datalist");
    list.id = `${control.name}-suggestions`;
    list.append(...control.suggestions.map((text) => option(text)));
    form.append(list);
    input.setAttribute("list", list.id);
  }
  return input;
}

const mode = () => field("mode").value;
const isArc = () => mode() === "interpolate" && field("way").value === "interpolate_latents";

function show() {
  const sampler = run.samplers[field("sampler").value];
  const offered = {
    eta: sampler.options.includes("eta"),
    order: sampler.options.includes("order"),
    resampling: ["ddpm", "ddim"].includes(field("sampler").value),
  };
  for (const element of all("[data-for], [data-hide], [data-option]")) {
    const { for: modes, hide, option: name } = element.dataset;
    element.hidden =
      (modes !== undefined && !modes.split(" ").includes(mode())) ||
      (hide === "arc" && isArc()) ||
      (name !== undefined && !offered[name]);
  }
  find("#hint").textContent = HINTS[mode()];
  find("#go").textContent = find("[name=mode]:checked + span").textContent;
  find("#t-value").textContent = `${field("t").value} of ${run.timesteps - 1}`;
  find("#first-title").textContent = mode() === "interpolate" ? "First picture" : "Picture";
  find("[name=spacing] option").textContent = `default (${isArc() ? "linspace" : sampler.spacing})`;
  showChoices();
  showTexts();
  find("[data-guidance]").hidden = !canGuide();
  showSlots();
}

// An edit without a prompt or class has nothing to guide it.
const isSaid = () => run.controls.some(({ name, only_guided }) => !only_guided && field(name).value.trim());
const canGuide = () => run.guidance && !isArc() && (mode() === "sample" || isSaid());
const isGuided = () => canGuide() && Number(field("guidance_scale").value) !== 1;

function showChoices() {
  // If nothing is chosen, sampling takes all in turn; an edit needs a network that works without a condition.
  const none = mode() === "sample" ? [option("", "all in turn")] : run.unconditional ? [option("", "none")] : [];
  for (const control of run.controls.filter((control) => !isText(control))) {
    const select = field(control.name);
    const before = select.value;
    select.replaceChildren(...none.map((o) => o.cloneNode(true)), ...control.choices.map((name, i) => option(i, name)));
    select.value = before;
    if (select.selectedIndex < 0) select.selectedIndex = 0;
  }
}

function showTexts() {
  const nothing = mode() === "sample" ? "captions of the data in turn" : run.unconditional ? "none" : "";
  for (const control of run.controls.filter(isText)) {
    const input = field(control.name);
    input.disabled = control.only_guided && !isGuided();
    input.required = !control.only_guided && !nothing;
    input.title = input.disabled ? "only with guidance" : ""; // since a text hides the placeholder
    input.placeholder = control.only_guided ? input.title || "none" : nothing;
  }
}

function settings() {
  // The visible fields of the form, and the pictures.
  const data = new FormData();
  for (const element of form.elements) {
    const isLeftOut = !element.name || ["mode", "way"].includes(element.name) || element.disabled;
    if (!isLeftOut && !element.closest("[hidden]")) data.set(element.name, element.value);
  }
  if (run.guidance && !canGuide()) data.set("guidance_scale", 1); // not the run's default
  if (mode() === "interpolate") {
    data.set("first", blob(pictures.first), "first.png");
    data.set("second", blob(pictures.second), "second.png");
  } else if (mode() !== "sample") {
    data.set("picture", blob(pictures.first), "picture.png");
  }
  if (mode() === "inpaint") data.set("mask", blob(painting.mask()), "mask.png");
  return data;
}

function missing() {
  if (mode() !== "sample" && !pictures.first) return "Choose a picture first.";
  if (mode() === "interpolate" && !pictures.second) return "Choose the second picture as well.";
  if (mode() === "inpaint" && painting.isEmpty()) return "Paint over the part to repaint.";
  return "";
}

function blob(url) {
  const bytes = atob(url.split(",")[1]);
  return new Blob([Uint8Array.from(bytes, (c) => c.charCodeAt(0))], { type: "image/png" });
}

// ---------------------------------------------------------------------------------------------------- requests

async function answer(response) {
  const found = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(found.error ?? `the server responded with status ${response.status}`);
  return found;
}

async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}

function say(text, isWrong = false, place = find("#status")) {
  if (place.textContent !== text) place.textContent = text;
  place.classList.toggle("wrong", isWrong);
}

function sentence(error) {
  const text = error instanceof TypeError ? "the server cannot be reached" : error.message;
  return `${text[0].toUpperCase()}${text.slice(1)}.`;
}

function duration(seconds) {
  return seconds < 90 ? `${Math.ceil(seconds)} s` : `${Math.ceil(seconds / 60)} minutes`;
}

function waiting({ ahead, seconds }) {
  const time = seconds === null ? "" : `, about ${duration(seconds)}`;
  return `Waiting: ${ahead} ${ahead === 1 ? "request is" : "requests are"} ahead of this one${time}.`;
}

async function ask() {
  const lacking = missing();
  if (lacking) return say(lacking, true);
  const controller = (running = new AbortController());
  const began = performance.now();
  const bar = find("#progress");
  const path = mode() === "interpolate" ? field("way").value : mode();
  const body = settings();
  ends = mode() === "interpolate" ? [pictures.first, pictures.second] : [];
  frames = [];
  choose(null);
  busy(true);
  say("Sent.");
  const stage = find(".stage");
  if (stage.getBoundingClientRect().top > 0.6 * innerHeight) stage.scrollIntoView(); // below, on a narrow screen
  try {
    const response = await fetch(`api/${path}`, { method: "POST", body, signal: controller.signal });
    if (!response.ok) await answer(response);
    let last = null;
    for await (const event of lines(response)) {
      last = event;
      if (event.state === "failed") throw new Error(event.error);
      if (event.state === "waiting" && event.ahead) say(waiting(event));
      if (event.state === "compiling") say("Compiling, the first time only …");
      if (event.state === "running") say("Denoising …");
      if (event.calls) bar.value = event.done / event.calls;
      if (event.pictures) {
        frames.push(event.pictures);
        draw(event.pictures);
      }
    }
    if (last?.state !== "done") throw new Error("the response was cut off");
    bar.value = 1;
    say(`Done in ${((performance.now() - began) / 1000).toFixed(1)} s. Select a picture to continue with it.`);
  } catch (error) {
    if (error.name === "AbortError") say("Cancelled.");
    else say(sentence(error), true);
    bar.value = 0;
  }
  running = null;
  busy(false);
}

function busy(is) {
  find("#go").disabled = is;
  find("#cancel").disabled = !is;
  find("#grid").setAttribute("aria-busy", is);
  find(".stage").classList.toggle("idle", !is);
  const replay = find("#replay");
  replay.hidden = is || frames.length < 2;
  find("input", replay).max = frames.length - 1;
  find("input", replay).value = frames.length - 1;
  if (is) find("#progress").value = 0;
}

// ---------------------------------------------------------------------------------------------------- pictures

function tile(source, alt, press) {
  const button = document.createElement("button");
  const image = document.createElement("img");
  button.type = "button";
  image.src = source;
  image.alt = alt;
  image.width = run.width;
  image.height = run.height;
  button.append(image);
  button.addEventListener("click", press);
  return button;
}

function draw(shown) {
  const made = ends.length ? [ends[0], ...shown, ends[1]] : shown;
  const grid = find("#grid");
  grid.classList.toggle("between", ends.length > 0);
  if (grid.children.length !== made.length) {
    grid.replaceChildren(...made.map((source, number) => tile(source, "", () => choose(number))));
  }
  made.forEach((source, number) => {
    const image = find("img", grid.children[number]);
    image.src = source;
    image.alt = `Picture ${number + 1} of ${made.length}`;
  });
  if (chosen !== null) find("#save").href = find("img", grid.children[chosen]).src;
}

function choose(number) {
  chosen = number === chosen ? null : number;
  const tiles = [...find("#grid").children];
  tiles.forEach((button, place) => button.setAttribute("aria-pressed", place === chosen));
  find("#use").hidden = chosen === null;
  if (chosen === null) return;
  find("#chosen").textContent = `Picture ${chosen + 1}:`;
  find("#save").href = find("img", tiles[chosen]).src;
}

function use(what) {
  const source = find("img", find("#grid").children[chosen]).src;
  setPicture(what === "second" ? "second" : "first", source);
  setMode(what === "vary" || what === "inpaint" ? what : "interpolate");
  find("#form").scrollIntoView({ block: "start" });
}

function setMode(name) {
  field("mode").value = name;
  show();
}

function setPicture(slot, source) {
  pictures[slot] = source;
  if (slot === "first") painting.load(source);
  showSlots();
}

function showSlots() {
  for (const slot of all(".slot")) {
    const source = pictures[slot.dataset.slot];
    const preview = find(".preview", slot);
    const image = find("img", preview);
    preview.hidden = mode() === "inpaint" && source !== null;
    preview.classList.toggle("full", source !== null);
    find("span", preview).hidden = source !== null;
    image.hidden = source === null;
    if (source !== null) {
      image.src = source;
      image.alt = "The chosen picture";
    }
  }
  find(".brushes").hidden = mode() !== "inpaint" || pictures.first === null;
}

async function bring(slot, file) {
  // The server crops and scales it, so that the preview is what the network will see.
  try {
    if (file.size > MAX_FILE) throw new Error(`the file has ${(file.size / 2 ** 20).toFixed(0)} MiB; accepted: up to 15`);
    const body = new FormData();
    body.set("picture", file);
    const found = await answer(await fetch("api/fit", { method: "POST", body }));
    setPicture(slot, found.picture);
    say("");
  } catch (error) {
    say(sentence(error), true);
  }
}

for (const slot of all(".slot")) {
  const name = slot.dataset.slot;
  const input = find("input[type=file]", slot);
  find(".file", slot).addEventListener("click", () => input.click());
  find(".training", slot).addEventListener("click", () => training.open(name));
  input.addEventListener("change", () => {
    if (input.files.length) bring(name, input.files[0]);
    input.value = "";
  });
  slot.addEventListener("dragover", (event) => {
    event.preventDefault();
    slot.classList.add("over");
  });
  slot.addEventListener("dragleave", () => slot.classList.remove("over"));
  slot.addEventListener("drop", (event) => {
    event.preventDefault();
    slot.classList.remove("over");
    if (event.dataTransfer.files.length) bring(name, event.dataTransfer.files[0]);
  });
}

// ---------------------------------------------------------------------------------------------------- training images

const training = {
  dialog: find("#training"),
  count: 40,
  first: 0,
  slot: "first",

  open(slot) {
    this.slot = slot;
    this.dialog.showModal();
    this.page(this.first);
  },

  async page(first) {
    const last = run.training_images - 1;
    this.first = Math.max(0, Math.min(first, last));
    const place = find("#training-status");
    try {
      const found = await answer(await fetch(`api/training_images?first=${this.first}&count=${this.count}`));
      const shown = found.pictures.map((source, i) =>
        tile(source, `Training image ${this.first + i}`, () => {
          setPicture(this.slot, source);
          this.dialog.close();
        }),
      );
      find("#training-grid").replaceChildren(...shown);
      say(`${this.first} to ${this.first + shown.length - 1} of ${last + 1}`, false, place);
    } catch (error) {
      say(sentence(error), true, place);
    }
    find("#earlier").disabled = this.first === 0;
    find("#later").disabled = this.first + this.count > last;
  },
};

find("#close").addEventListener("click", () => training.dialog.close());
find("#earlier").addEventListener("click", () => training.page(training.first - training.count));
find("#later").addEventListener("click", () => training.page(training.first + training.count));
find("#anywhere").addEventListener("click", () => training.page(Math.floor(Math.random() * run.training_images)));

// ---------------------------------------------------------------------------------------------------- painting

const painting = {
  canvas: find("#canvas"),
  image: null,
  painted: null, // Uint8Array [H * W], 1 where to repaint
  cursor: null, // of the keyboard, [x, y]
  before: null, // where the pointer was

  async load(source) {
    const image = new Image();
    image.src = source;
    await image.decode();
    this.image = image;
    this.painted = new Uint8Array(run.width * run.height);
    this.draw();
  },

  isEmpty() {
    return !this.painted?.some(Boolean);
  },

  draw() {
    if (!this.image) return;
    const { width, height } = run;
    const scale = Math.max(1, Math.ceil(320 / Math.max(width, height)));
    const { canvas } = this;
    if (canvas.width !== width * scale) [canvas.width, canvas.height] = [width * scale, height * scale];
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(this.image, 0, 0, canvas.width, canvas.height);
    // Paint that is visible on dark and on light: a nearly opaque colour with light corners.
    let count = 0;
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        if (!this.painted[y * width + x]) continue;
        count++;
        context.fillStyle = (x + y) % 2 ? "rgb(224 92 40 / 0.88)" : "rgb(240 124 72 / 0.88)";
        context.fillRect(x * scale, y * scale, scale, scale);
      }
    }
    if (this.cursor && document.activeElement === canvas) {
      const [x, y] = this.cursor;
      context.lineWidth = 3;
      context.strokeStyle = "#1f5fa8";
      context.strokeRect(x * scale + 1.5, y * scale + 1.5, scale - 3, scale - 3);
    }
    const share = Math.round((100 * count) / (width * height));
    canvas.setAttribute("aria-label", `The picture, ${share} % of it painted over`);
  },

  dab(x, y) {
    const radius = find("#brush").value / 2;
    const value = find("#erase").checked ? 0 : 1;
    for (let row = 0; row < run.height; row++) {
      for (let column = 0; column < run.width; column++) {
        const near = Math.hypot(column + 0.5 - x, row + 0.5 - y) <= Math.max(radius, 0.71);
        if (near) this.painted[row * run.width + column] = value;
      }
    }
  },

  stroke(event) {
    const box = this.canvas.getBoundingClientRect();
    const border = this.canvas.clientLeft;
    const x = ((event.clientX - box.left - border) / this.canvas.clientWidth) * run.width;
    const y = ((event.clientY - box.top - border) / this.canvas.clientHeight) * run.height;
    const [fromX, fromY] = this.before ?? [x, y];
    const dabs = Math.ceil(2 * Math.hypot(x - fromX, y - fromY)) || 1;
    for (let i = 1; i <= dabs; i++) this.dab(fromX + ((x - fromX) * i) / dabs, fromY + ((y - fromY) * i) / dabs);
    this.before = [x, y];
    this.draw();
  },

  key(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const [x, y] = this.cursor ?? [Math.floor(run.width / 2), Math.floor(run.height / 2)];
    if (event.key in moves) {
      const [right, down] = moves[event.key];
      const within = (value, size) => Math.max(0, Math.min(size - 1, value));
      this.cursor = [within(x + right, run.width), within(y + down, run.height)];
    } else if (event.key === " ") {
      this.cursor = [x, y];
      this.dab(x + 0.5, y + 0.5);
    } else return;
    event.preventDefault();
    this.draw();
  },

  mask() {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [run.width, run.height];
    const context = canvas.getContext("2d");
    const data = context.createImageData(run.width, run.height);
    this.painted.forEach((value, i) => data.data.set([255 * value, 255 * value, 255 * value, 255], 4 * i));
    context.putImageData(data, 0, 0);
    return canvas.toDataURL("image/png");
  },
};

painting.canvas.addEventListener("pointerdown", (event) => {
  painting.canvas.setPointerCapture(event.pointerId);
  painting.before = null;
  painting.cursor = null;
  painting.stroke(event);
});
painting.canvas.addEventListener("pointermove", (event) => {
  if (painting.canvas.hasPointerCapture(event.pointerId)) painting.stroke(event);
});
painting.canvas.addEventListener("keydown", (event) => painting.key(event));
painting.canvas.addEventListener("blur", () => painting.draw());
find("#clear").addEventListener("click", () => {
  painting.painted.fill(0);
  painting.draw();
});

// ---------------------------------------------------------------------------------------------------- start

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) ask();
});
form.addEventListener("input", show);
find("#cancel").addEventListener("click", () => running?.abort());
find("#another").addEventListener("click", () => (field("seed").value = Math.floor(Math.random() * 2 ** 32)));
find("#replay input").addEventListener("input", (event) => draw(frames[event.target.value]));
for (const button of all("[data-use]")) button.addEventListener("click", () => use(button.dataset.use));

try {
  run = await answer(await fetch("api/run"));
  fill();
  show();
  say("No pictures yet: press Sample.");
} catch (error) {
  say(sentence(error), true);
}
