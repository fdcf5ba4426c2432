// What llama.cpp makes of GGUF files: node judge.mjs FILE < {"texts": [...], "greedy": "prompt", "n": 8} > JSON
// Needs the npm package node-llama-cpp; NODE_LLAMA names the folder that has its node_modules.
import {createRequire} from "module";
import path from "path";
import fs from "fs";
import {pathToFileURL} from "url";

const require = createRequire(path.join(process.env.NODE_LLAMA, "package.json"));
const {getLlama, LlamaLogLevel} = await import(
    pathToFileURL(path.join(process.env.NODE_LLAMA, "node_modules/node-llama-cpp/dist/index.js"))
);
const asked = JSON.parse(fs.readFileSync(0, "utf8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: 2});
const model = await llama.loadModel({modelPath: process.argv[2]});
const context = await model.createContext({contextSize: 512, batchSize: 512, sequences: 1, flashAttention: false});
const sequence = context.getSequence();
const answer = {tokens: [], nll: [], greedy: ""};
for (const text of asked.texts) {
    const tokens = asked.ids ? text : model.tokenize(text);
    answer.tokens.push(Array.from(tokens));
    await sequence.clearHistory();
    // probabilities of the next token, after each token
    const items = Array.from(tokens).map((token) => [token, {generateNext: {probabilities: true}}]);
    const found = await sequence.controlledEvaluate(items);
    let sum = 0;
    for (let i = 0; i + 1 < tokens.length; i++) {
        sum -= Math.log(found[i].next.probabilities.get(tokens[i + 1]));
    }
    answer.nll.push(sum / (tokens.length - 1));
}
if (asked.greedy !== undefined) {
    await sequence.clearHistory();
    const tokens = model.tokenize(asked.greedy);
    const out = [];
    for await (const token of sequence.evaluate(tokens, {temperature: 0})) {
        out.push(token);
        if (out.length >= (asked.n ?? 8)) break;
    }
    answer.greedy = model.detokenize(out);
}
console.log(JSON.stringify(answer));
process.exit(0);
