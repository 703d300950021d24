// Generates with transformers.js from a folder in the hub's layout: node hub_worker.mjs PACKAGES JOB.json RESULT.json
//
// PACKAGES is where `npm install @huggingface/transformers` put node_modules. The job is {folder, dtypes, ids, tokens};
// the result is {version, tokens}, a list per dtype, or the error instead.
import fs from "node:fs";
import path from "node:path";
import { createRequire } from "node:module";

const [packages, job, result] = process.argv.slice(2);
const entry = createRequire(path.join(path.resolve(packages), "package.json")).resolve("@huggingface/transformers");
const { AutoModelForCausalLM, Tensor, env } = await import(entry);
const { folder, dtypes, ids, tokens } = JSON.parse(fs.readFileSync(job));
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder);

async function generate(dtype) {
  try {
    const model = await AutoModelForCausalLM.from_pretrained(path.basename(folder), { dtype });
    const prompt = new Tensor("int64", BigInt64Array.from(ids.map(BigInt)), [1, ids.length]);
    const attended = new Tensor("int64", new BigInt64Array(ids.length).fill(1n), [1, ids.length]);
    const options = { max_new_tokens: tokens, do_sample: false };
    const found = await model.generate({ inputs: prompt, attention_mask: attended, ...options });
    return found.tolist()[0].map(Number);
  } catch (error) {
    return String(error.message ?? error);
  }
}

const found = [];
for (const dtype of dtypes) found.push(await generate(dtype));
fs.writeFileSync(result, JSON.stringify({ version: env.version, tokens: found }));
process.exit(0);
