'use strict';
// Shows label maps of a picture or of a camera's frames; worker.js makes them.
// Names of classes and files are set as text, never as HTML.

const byId = (id) => document.getElementById(id);
const PROVIDERS = { webgpu: 'WebGPU', wasm: 'WebAssembly' };
const about = load();
const worker = start();
const waiting = new Map(); // By number, what resolves and rejects.
let provider = null;
let asked = 0; // Number of the newest request; answers to others are late.
let shown = null; // {name, labels, width, height}
let stream = null; // Of the camera.

// --- Messages ----------------------------------------------------------------

function say(text) {
  byId('status').textContent = text;
}

function fail(text) {
  byId('problem').textContent = text;
  byId('problem').hidden = !text;
}

function megabytes(bytes) {
  return (bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0);
}

// --- The network -------------------------------------------------------------

async function load() {
  const found = await (await fetch('model.json')).json();
  document.title = `${found.title}: semantic segmentation`;
  const [height, width] = found.canvas;
  byId('about').textContent =
    `${found.title}, ${found.classes.length} classes, for pictures of up to ` +
    `${width} × ${height} pixels`;
  return found;
}

function start() {
  const refused =
    'The network could not be started. The page needs a current browser and ' +
    'a server, such as: python -m http.server';
  about.catch(() => fail(refused));
  try {
    const made = new Worker(`worker.js${location.search}`, { type: 'module' });
    made.onerror = () => fail(refused);
    made.onmessage = ({ data }) => hear(data);
    say('Loading the network.');
    return made;
  } catch {
    fail(refused); // A page without a server may not have workers.
    return null;
  }
}

function hear({ number, loaded, total, ready, problem, ...found }) {
  if (loaded) {
    byId('progress').value = loaded / total;
    // Not in the status, all of which screen readers say.
    byId('part').textContent = `${megabytes(loaded)} of ${megabytes(total)} MB`;
  } else if (ready) {
    provider = PROVIDERS[ready];
    byId('loading').hidden = true;
    say(`The network is ready, on ${provider}.`);
  } else if (number === undefined) {
    byId('loading').hidden = true;
    say('');
    fail(`The network could not be loaded: ${problem}`);
  } else {
    const { resolve, reject } = waiting.get(number);
    waiting.delete(number);
    if (problem) reject(new Error(problem));
    else resolve(found);
  }
}

function ask(image) {
  const number = asked;
  worker.postMessage({ number, image });
  return new Promise((resolve, reject) => {
    waiting.set(number, { resolve, reject });
  });
}

// --- Pictures ----------------------------------------------------------------

async function pixelsOf(source, width, height) {
  const [high, wide] = (await about).canvas;
  const ratio = Math.min(1, high / height, wide / width);
  const canvas = document.createElement('canvas');
  canvas.width = Math.max(1, Math.round(width * ratio));
  canvas.height = Math.max(1, Math.round(height * ratio));
  const context = canvas.getContext('2d');
  context.imageSmoothingQuality = 'high';
  context.drawImage(source, 0, 0, canvas.width, canvas.height);
  const image = context.getImageData(0, 0, canvas.width, canvas.height);
  // Transparency is left out, as it is by predict.py.
  for (let i = 3; i < image.data.length; i += 4) image.data[i] = 255;
  return image;
}

function place(image, name) {
  for (const id of ['picture', 'colours']) {
    byId(id).width = image.width; // Also clears it.
    byId(id).height = image.height;
  }
  byId('picture').getContext('2d').putImageData(image, 0, 0);
  const told = `${name}; its classes are listed below`;
  byId('picture').setAttribute('aria-label', told);
  byId('result').hidden = false;
  byId('legend').replaceChildren();
  byId('facts').textContent = '';
  byId('download').disabled = true;
  shown = null;
}

async function paint(labels, { width, height }, name) {
  const { classes, palette } = await about;
  const colours = Uint8Array.from(palette.flatMap((x) => [...x, 255]));
  const words = new Uint32Array(colours.buffer); // A pixel each.
  const image = new ImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  const counts = new Uint32Array(classes.length);
  labels.forEach((index, i) => {
    counts[index]++;
    pixels[i] = words[index];
  });
  byId('colours').getContext('2d').putImageData(image, 0, 0);
  const order = [...classes.keys()].filter((i) => counts[i]);
  order.sort((a, b) => counts[b] - counts[a]);
  byId('legend').replaceChildren(
    ...order.map((i) => entry(classes[i], palette[i], counts[i] / labels.length)),
  );
  shown = { name, labels, width, height };
  byId('download').disabled = false;
}

function entry(name, colour, share) {
  const [item, swatch, title, number] = ['li', 'span', 'span', 'span'].map(
    (tag) => document.createElement(tag),
  );
  swatch.className = 'swatch';
  swatch.style.background = `rgb(${colour})`;
  title.textContent = name;
  const percent = 100 * share;
  number.textContent = percent < 0.1 ? '< 0.1 %' : `${percent.toFixed(1)} %`;
  item.append(swatch, title, ' ', number);
  return item;
}

// A camera's frame is shown with its labels, a picture before them.
async function look(source, width, height, name, live) {
  const number = ++asked;
  fail('');
  const image = await pixelsOf(source, width, height);
  if (number !== asked) return;
  if (!live) place(image, name);
  const { labels, milliseconds } = await ask(image);
  if (number !== asked) return;
  if (live) place(image, name);
  await paint(labels, image, name);
  const size = `${image.width} × ${image.height}`;
  const scaled =
    image.width === width && image.height === height
      ? ''
      : `. It is larger than the network takes and was scaled down to ${size}`;
  const told = `${name}: ${width} × ${height} pixels${scaled}.`;
  const took = `${milliseconds.toFixed(0)} ms on ${provider}`;
  byId('facts').textContent = `${told} Labelled in ${took}.`;
  if (!live) say(`Done. ${told}`);
}

async function label(file) {
  stopCamera();
  try {
    say(`Labelling ${file.name}.`);
    const bitmap = await createImageBitmap(file, { colorSpaceConversion: 'none' });
    await look(bitmap, bitmap.width, bitmap.height, file.name, false);
  } catch (error) {
    say('');
    byId('result').hidden = true; // Of another picture.
    fail(`${file.name} could not be labelled: ${error.message}`);
  }
}

byId('file').addEventListener('change', ({ target }) => {
  if (target.files.length) label(target.files[0]);
});
for (const kind of ['dragover', 'dragleave', 'drop', 'paste']) {
  document.addEventListener(kind, (event) => {
    document.body.classList.toggle('over', kind === 'dragover');
    const [file] = (event.dataTransfer ?? event.clipboardData).files;
    if (kind !== 'paste') event.preventDefault(); // Else it would be opened.
    if (file && kind !== 'dragover') label(file);
  });
}

// --- The camera --------------------------------------------------------------

function stopCamera() {
  stream?.getTracks().forEach((track) => track.stop());
  stream = null;
  byId('camera').textContent = 'Use the camera';
  byId('camera').disabled = false;
}

byId('camera').addEventListener('click', async () => {
  if (stream) {
    stopCamera();
    say('The camera is off.');
    return;
  }
  try {
    if (!navigator.mediaDevices) {
      throw new Error('browsers give it to pages of https or localhost alone.');
    }
    byId('camera').disabled = true; // The browser may ask the user.
    stream = await navigator.mediaDevices.getUserMedia({
      video: { facingMode: 'environment' },
    });
    byId('camera').textContent = 'Stop the camera';
    byId('camera').disabled = false;
    say('The camera is on.');
    const video = document.createElement('video');
    video.muted = true;
    video.playsInline = true;
    video.srcObject = stream;
    await video.play();
    const mine = stream;
    while (stream === mine) {
      await look(video, video.videoWidth, video.videoHeight, 'Camera', true);
    }
  } catch (error) {
    stopCamera();
    say('');
    fail(`The camera could not be used: ${error.message}`);
  }
});

// --- What can be done with a label map ---------------------------------------

byId('opacity').addEventListener('input', showOpacity);
showOpacity(); // A browser may restore what was set before.

function showOpacity() {
  const { value } = byId('opacity');
  byId('colours').style.opacity = value / 100;
  byId('percent').textContent = `${value} %`;
}

byId('download').addEventListener('click', async () => {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(await png(shown, (await about).palette));
  link.download = `${shown.name.replace(/\.[^.]*$/, '')}_labels.png`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
});

// Of 8 bits: pixels are class numbers, and the palette has their colours.
async function png({ labels, width, height }, palette) {
  const rows = new Uint8Array((width + 1) * height); // Each begins with a 0.
  for (let y = 0; y < height; y++) {
    const row = labels.subarray(y * width, (y + 1) * width);
    rows.set(row, y * (width + 1) + 1);
  }
  const zlib = new CompressionStream('deflate');
  const packed = new Response(new Blob([rows]).stream().pipeThrough(zlib));
  const header = new DataView(new ArrayBuffer(13));
  header.setUint32(0, width);
  header.setUint32(4, height);
  header.setUint16(8, 0x0803); // 8 bits, with a palette.
  const parts = [
    new Uint8Array([0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a]),
    chunk('IHDR', new Uint8Array(header.buffer)),
    chunk('PLTE', new Uint8Array(palette.flat())),
    chunk('IDAT', new Uint8Array(await packed.arrayBuffer())),
    chunk('IEND', new Uint8Array()),
  ];
  return new Blob(parts, { type: 'image/png' });
}

function chunk(kind, content) {
  const bytes = new Uint8Array(content.length + 12);
  bytes.set(new TextEncoder().encode(kind), 4);
  bytes.set(content, 8);
  let checksum = -1; // CRC-32.
  for (const byte of bytes.subarray(4, -4)) {
    checksum ^= byte;
    for (let bit = 0; bit < 8; bit++) {
      checksum = (checksum >>> 1) ^ (checksum & 1 ? 0xedb88320 : 0);
    }
  }
  const view = new DataView(bytes.buffer);
  view.setUint32(0, content.length);
  view.setUint32(bytes.length - 4, ~checksum);
  return bytes;
}
