// Runs models in onnxruntime-web's WebAssembly build: node web_worker.mjs FOLDER JOBS.json RESULTS.json
//
// FOLDER is where `npm install onnxruntime-web` put node_modules. A job is {model, output, feeds}, a feed is
// {type, dims, data} with little-endian bytes in base64; a result is {data} or {error}.
import fs from "node:fs";
import path from "node:path";
import { createRequire } from "node:module";

const [folder, jobs, results] = process.argv.slice(2);
const ort = createRequire(path.join(path.resolve(folder), "package.json"))("onnxruntime-web");
ort.env.logLevel = "fatal";
ort.env.wasm.numThreads = 1;

const ARRAYS = { float32: Float32Array, int64: BigInt64Array, int8: Int8Array, uint8: Uint8Array };

function tensor({ type, dims, data }) {
  const bytes = Uint8Array.from(Buffer.from(data, "base64"));
  return new ort.Tensor(type, new ARRAYS[type](bytes.buffer), dims);
}

async function run({ model, output, feeds }) {
  try {
    const session = await ort.InferenceSession.create(fs.readFileSync(model), { executionProviders: ["wasm"] });
    const inputs = Object.fromEntries(Object.entries(feeds).map(([name, feed]) => [name, tensor(feed)]));
    const { data } = (await session.run(inputs, [output]))[output];
    await session.release();
    return { data: Buffer.from(data.buffer, data.byteOffset, data.byteLength).toString("base64") };
  } catch (error) {
    return { error: String(error.message ?? error) };
  }
}

const found = [];
for (const job of JSON.parse(fs.readFileSync(jobs))) found.push(await run(job));
fs.writeFileSync(results, JSON.stringify({ version: ort.env.versions.web, results: found }));
process.exit(0);
