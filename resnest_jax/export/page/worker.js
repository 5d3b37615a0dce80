// Runs the network: on WebGPU where there is an adapter, else on WebAssembly.
// Answers each {number, image} with {number, labels, milliseconds} or a problem.

const RUNTIMES = {
  webgpu: './onnxruntime/ort-webgpu.js',
  wasm: './onnxruntime/ort-wasm.js',
};

const about = fetch('model.json').then((answer) => answer.json());
let network = openAny();
// A runtime takes one picture at a time.
let before = network.catch((error) => postMessage({ problem: error.message }));

onmessage = ({ data }) => {
  before = before.then(() => answer(data));
};

async function answer({ number, image }) {
  try {
    postMessage({ number, ...(await labelsOf(image)) });
  } catch (error) {
    postMessage({ number, problem: error.message });
  }
}

async function labelsOf(image) {
  const opened = await network;
  try {
    return await run(opened, image);
  } catch (error) {
    if (opened.provider === 'wasm') throw error;
    console.warn(error); // A GPU may be lost, or its memory too small.
    network = open('wasm').then(ready);
    return run(await network, image);
  }
}

async function openAny() {
  // worker.js?wasm leaves the GPU alone.
  if (location.search !== '?wasm' && (await navigator.gpu?.requestAdapter())) {
    try {
      const opened = await open('webgpu');
      await run(opened, new ImageData(1, 1)); // Also compiles the shaders.
      return ready(opened);
    } catch (error) {
      console.warn(error);
    }
  }
  return ready(await open('wasm'));
}

function ready(opened) {
  postMessage({ ready: opened.provider });
  return opened;
}

async function open(provider) {
  const ort = await import(RUNTIMES[provider]);
  ort.env.wasm.numThreads = 1; // More need headers that few servers send.
  const { file, bytes } = await about;
  const session = await ort.InferenceSession.create(await read(file, bytes), {
    executionProviders: [provider],
    freeDimensionOverrides: { b: 1 },
    logSeverityLevel: 3, // Errors alone; it warns of what the GPU leaves over.
  });
  return { provider, ort, session };
}

async function read(address, total) {
  const response = await fetch(address);
  if (!response.ok) throw new Error(`${address}: ${response.status}`);
  const content = new Uint8Array(total);
  const reader = response.body.getReader();
  let loaded = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    content.set(value, loaded);
    loaded += value.length;
    postMessage({ loaded, total });
  }
  if (loaded < total) throw new Error(`${address} was cut off.`);
  return content;
}

async function run({ ort, session }, { data, width, height }) {
  const [high, wide] = (await about).canvas;
  const pixels = new Uint8Array(3 * high * wide);
  for (let y = 0; y < height; y++) {
    let to = 3 * y * wide;
    for (let from = 4 * y * width; from < 4 * (y + 1) * width; from += 4) {
      pixels[to++] = data[from];
      pixels[to++] = data[from + 1];
      pixels[to++] = data[from + 2];
    }
  }
  const size = (length) => new ort.Tensor('int32', [length], [1]);
  const start = performance.now();
  const { labels } = await session.run({
    images: new ort.Tensor('uint8', pixels, [1, high, wide, 3]),
    heights: size(height),
    widths: size(width),
  });
  const milliseconds = performance.now() - start;
  const inside = new Uint8Array(height * width);
  for (let y = 0; y < height; y++) {
    inside.set(labels.data.subarray(y * wide, y * wide + width), y * width);
  }
  return { labels: inside, milliseconds };
}
