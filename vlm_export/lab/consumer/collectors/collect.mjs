// Asks transformers.js what it makes of the questions beside this file:
//   npm install @huggingface/transformers
//   node collect.mjs MODEL_DIRECTORY [DTYPE]
// MODEL_DIRECTORY is what your program loads (a bundle is one), DTYPE its variant (default: fp32). The answers go to
// `answers/` here. Change the calls below to what your own program does.
import fs from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import * as transformers from '@huggingface/transformers';

const { AutoImageProcessor, AutoTokenizer, RawImage, env } = transformers;
const here = path.dirname(fileURLToPath(import.meta.url));
const model = path.resolve(process.argv[2]);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(model);
const name = path.basename(model);
const options = { dtype: process.argv[3] ?? 'fp32' };
const read = (file) => JSON.parse(fs.readFileSync(path.join(model, file), 'utf8'));
// CLIPModel has CLIPTextModelWithProjection, other models have only a class without that word.
const prefix = read('config.json').architectures[0].replace(/Model$/, '');
function classOf(tower) {
    const found = transformers[`${prefix}${tower}ModelWithProjection`] ?? transformers[`${prefix}${tower}Model`];
    if (!found) throw new Error(`transformers.js has no class of ${prefix} for one encoder alone`);
    return found;
}
// A bundle says how texts are padded; of another directory change it to what your program does.
const isBundle = fs.existsSync(path.join(model, 'vlm_export.json'));
const padding = isBundle && read('vlm_export.json').text?.padding === 'context' ? 'max_length' : true;

// A tokenizer that transformers.js cannot read leaves the texts out, and nothing else.
const tokenizer = await AutoTokenizer.from_pretrained(name).catch((error) => () => Promise.reject(error));
const textModel = await classOf('Text').from_pretrained(name, options);
const processor = await AutoImageProcessor.from_pretrained(name);
const visionModel = await classOf('Vision').from_pretrained(name, options);

function vector(outputs, kind) {
    return (outputs[`${kind}_embeds`] ?? outputs.pooler_output).normalize(2, -1).tolist()[0];
}

async function answerText(text) {
    const inputs = await tokenizer([text], { padding, truncation: true });
    return { ids: inputs.input_ids.tolist()[0].map(Number), text_vectors: vector(await textModel(inputs), 'text') };
}

async function answerImage(file) {
    const inputs = await processor(await RawImage.read(file));
    return { pixels: inputs.pixel_values.tolist()[0], image_vectors: vector(await visionModel(inputs), 'image') };
}

const answers = path.join(here, 'answers');
fs.mkdirSync(answers, { recursive: true });
for (const [kind, items, answer, label] of [
    ['texts', JSON.parse(fs.readFileSync(path.join(here, 'texts.json'), 'utf8')), answerText, (text) => text],
    [
        'images',
        fs.readdirSync(path.join(here, 'images')).sort().map((file) => path.join(here, 'images', file)),
        answerImage,
        (file) => path.basename(file),
    ],
]) {
    const kept = [];
    const columns = {};
    for (const item of items) {
        try {
            for (const [column, value] of Object.entries(await answer(item))) (columns[column] ??= []).push(value);
            kept.push(label(item));
        } catch (error) {
            console.error(`${label(item)}: left out: ${error}`);
        }
    }
    for (const [column, rows] of Object.entries({ ...columns, [kind]: kept })) {
        fs.writeFileSync(path.join(answers, `${column}.json`), JSON.stringify(rows));
    }
}
