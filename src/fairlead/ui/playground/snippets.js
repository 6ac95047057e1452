// @ts-check
/** The request of a page as lines for a terminal or a Python program, with the server's public address and never a session. */

/**
 * @typedef {object} Where
 * @property {string} url of the data port, without a slash at its end
 * @property {boolean} keys whether callers must show one
 *
 * @typedef {{id: string, label: string, text: string}} Snippet
 */

const KEY = "FAIRLEAD_API_KEY";
/** Of one tensor in a snippet; more are left to whoever pastes it. */
const MAX_VALUES = 2000;

/** @param {string} text @returns {string} one word of a POSIX shell */
export function shell(text) {
  return `'${text.replace(/'/g, `'\\''`)}'`;
}

/**
 * @param {unknown} value of JSON
 * @param {number} indent spaces before what stands on a line of its own
 * @returns {string} the same in Python
 */
export function python(value, indent = 0) {
  if (value === null || value === undefined) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  // JSON's escapes are Python's; half a character, which no program could send, becomes the sign for that
  if (typeof value === "string") return JSON.stringify(/** @type {any} */ (value).toWellFormed?.() ?? value).replace(/[\u007f-\u009f\u2028\u2029\ufeff]/g, escaped);
  if (typeof value === "number") return Number.isFinite(value) ? String(value) : `float("${value}")`;
  const [items, opening, closing] = Array.isArray(value)
    ? [value.map((each) => python(each, indent + 4)), "[", "]"]
    : [Object.entries(value).map(([name, each]) => `${python(name)}: ${python(each, indent + 4)}`), "{", "}"];
  const line = opening + items.join(", ") + closing;
  if (line.length + indent <= 100 && !line.includes("\n")) return line;
  const pad = " ".repeat(indent + 4);
  return `${opening}\n${items.map((item) => `${pad}${item},\n`).join("")}${" ".repeat(indent)}${closing}`;
}

/** @param {string} character */
function escaped(character) {
  return `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`;
}

/**
 * @param {Where} where
 * @param {string} path
 * @param {unknown} body
 * @param {string} flags
 */
function curl(where, path, body, flags = "-s") {
  const key = where.keys ? ` \\\n  -H "Authorization: Bearer $${KEY}"` : "";
  return `curl ${flags} ${shell(where.url + path)}${key} \\\n  -H 'Content-Type: application/json' \\\n  -d ${shell(JSON.stringify(body))}\n`;
}

/** @param {Where} where */
function sdk(where) {
  const key = where.keys ? `os.environ["${KEY}"]` : '"none"';
  return `${where.keys ? "import os\n\n" : ""}from openai import OpenAI\n\nclient = OpenAI(base_url=${python(`${where.url}/v1`)}, api_key=${key})\n`;
}

/** Parameters that OpenAI's SDK has no name for. */
const BEYOND = ["top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "priority"];

/** @param {Record<string, any>} body @returns {string} the arguments of a call of the SDK, one a line */
function keywords(body) {
  const own = Object.entries(body).filter(([name]) => !BEYOND.includes(name));
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => BEYOND.includes(name)));
  const lines = own.map(([name, value]) => `    ${name}=${python(value, 4)},\n`);
  if (Object.keys(extra).length) lines.push(`    extra_body=${python(extra, 4)},\n`);
  return lines.join("");
}

/**
 * @param {Where} where
 * @param {Record<string, any>} body of POST /v1/chat/completions, without `stream`
 * @returns {Snippet[]}
 */
export function ofChat(where, body) {
  const streamed = { ...body, stream: true };
  const loop = `for chunk in stream:\n    for choice in chunk.choices:\n        print(choice.delta.content or "", end="", flush=True)\nprint()\n`;
  return [
    { id: "curl", label: "curl", text: curl(where, "/v1/chat/completions", streamed, "-sN") },
    { id: "openai", label: "Python (OpenAI SDK)", text: `${sdk(where)}stream = client.chat.completions.create(\n${keywords(streamed)})\n${loop}` },
    { id: "requests", label: "Python (requests)", text: posted(where, "/v1/chat/completions", body, `answer["choices"][0]["message"]["content"]`) },
  ];
}

/** @param {Where} where @param {Record<string, any>} body of POST /v1/completions @returns {Snippet[]} */
export function ofCompletion(where, body) {
  return [
    { id: "curl", label: "curl", text: curl(where, "/v1/completions", body) },
    {
      id: "openai",
      label: "Python (OpenAI SDK)",
      text: `${sdk(where)}completion = client.completions.create(\n${keywords(body)})\nprint(completion.choices[0].text)\n`,
    },
    { id: "requests", label: "Python (requests)", text: posted(where, "/v1/completions", body, `answer["choices"][0]["text"]`) },
  ];
}

/** @param {Where} where @param {{model: string, input: string[]}} body @returns {Snippet[]} */
export function ofEmbeddings(where, body) {
  const cosine = `first, second = (each.embedding for each in answer.data)\ncosine = sum(a * b for a, b in zip(first, second))\ncosine /= sum(a * a for a in first) ** 0.5 * sum(b * b for b in second) ** 0.5\nprint(f"{cosine:.4f}")\n`;
  return [
    { id: "curl", label: "curl", text: curl(where, "/v1/embeddings", body) },
    { id: "openai", label: "Python (OpenAI SDK)", text: `${sdk(where)}answer = client.embeddings.create(\n${keywords(body)})\n${cosine}` },
  ];
}

/** @param {Where} where @param {{model: string, input: Record<string, any>}} body of POST /v1/jobs @returns {Snippet[]} */
export function ofPictures(where, body) {
  const { preview_steps, ...input } = body.input;
  const { prompt, n, width, height, ...more } = input;
  const size = width && height ? { size: `${width}x${height}` } : {};
  const known = { model: body.model, prompt, ...(n ? { n } : {}), ...size, response_format: "b64_json" };
  const wait = { ...body, input };
  const key = where.keys ? `headers["Authorization"] = f"Bearer {os.environ['${KEY}']}"\n` : "";
  const job =
    `import ${where.keys ? "os\n\nimport " : ""}requests\n\nheaders = {"Prefer": "wait=60"}\n${key}` +
    `job = requests.post(${python(`${where.url}/v1/jobs`)}, headers=headers, json=${python(wait)}, timeout=90).json()\n` +
    `for number, picture in enumerate(job["result"]["pictures"]):\n    data = requests.get(picture["url"], timeout=60).content\n` +
    `    open(f"picture-{number}.png", "wb").write(data)\n    print(f"picture-{number}.png", picture["width"], picture["height"], picture["seed"])\n`;
  const extra = Object.keys(more).length ? `    extra_body=${python(more, 4)},\n` : "";
  const pictures =
    `import base64\n${sdk(where)}pictures = client.images.generate(\n${keywords(known)}${extra})\n` +
    `for number, picture in enumerate(pictures.data):\n    open(f"picture-{number}.png", "wb").write(base64.b64decode(picture.b64_json))\n    print(f"picture-{number}.png")\n`;
  return [
    { id: "curl", label: "curl", text: curl(where, "/v1/jobs", wait, "-s -H 'Prefer: wait=60'") },
    { id: "openai", label: "Python (OpenAI SDK)", text: pictures },
    { id: "requests", label: "Python (requests)", text: job },
  ];
}

/** @type {Record<string, string>} */
const DTYPES = { BOOL: "bool_", FP16: "float16", FP32: "float32", FP64: "float64", BYTES: "object_" };

/** @param {string} datatype */
function dtype(datatype) {
  return DTYPES[datatype] ?? datatype.toLowerCase();
}

/**
 * @param {Where} where
 * @param {string} model
 * @param {string} version "" for the default one
 * @param {import("./tensors.js").Tensor[]} tensors
 * @returns {Snippet[]}
 */
export function ofTensors(where, model, version, tensors) {
  const path = `/v2/models/${encodeURIComponent(model)}${version ? `/versions/${version}` : ""}/infer`;
  const large = tensors.some((each) => each.data.length > MAX_VALUES);
  const snippets = [];
  if (!large) {
    const body = { inputs: tensors };
    snippets.push({ id: "curl", label: "curl", text: curl(where, path, body) });
    snippets.push({ id: "requests", label: "Python (requests)", text: posted(where, path, body, `[(each["name"], each["shape"], each["data"]) for each in answer["outputs"]]`) });
  }
  if (!tensors.some((each) => each.datatype === "BF16")) snippets.push({ id: "triton", label: "Python (tritonclient)", text: triton(where, model, version, tensors) });
  return snippets;
}

/**
 * @param {Where} where
 * @param {string} model
 * @param {string} version
 * @param {import("./tensors.js").Tensor[]} tensors
 */
function triton(where, model, version, tensors) {
  const { host, protocol } = new URL(where.url);
  const lines = [...(where.keys ? ["import os", ""] : []), "import numpy as np", "import tritonclient.http as triton", ""];
  lines.push(`client = triton.InferenceServerClient(${python(host)}${protocol === "https:" ? ", ssl=True" : ""})`, "inputs = []");
  for (const { name, datatype, shape, data } of tensors) {
    const kind = dtype(datatype);
    const bytes = datatype === "BYTES" ? data.map((each) => `${python(String(each))}.encode()`).join(", ") : "";
    const large = data.length > MAX_VALUES;
    if (large) lines.push("# put your own values here: these are zeros");
    const array = large ? `np.zeros(${python(shape)}, np.${kind})` : `np.array([${bytes || data.map((each) => python(each)).join(", ")}], np.${kind}).reshape(${python(shape)})`;
    lines.push(`array = ${array}`, `tensor = triton.InferInput(${python(name)}, list(array.shape), ${python(datatype)})`, "tensor.set_data_from_numpy(array)", "inputs.append(tensor)");
  }
  const headers = where.keys ? `, headers={"Authorization": f"Bearer {os.environ['${KEY}']}"}` : "";
  lines.push(`result = client.infer(${python(model)}, inputs${version ? `, model_version=${python(version)}` : ""}${headers})`);
  lines.push(`for output in result.get_response()["outputs"]:`, `    print(output["name"], result.as_numpy(output["name"]))`, "");
  return lines.join("\n");
}

/**
 * @param {Where} where
 * @param {string} path
 * @param {unknown} body
 * @param {string} shown what is printed of `answer`
 */
function posted(where, path, body, shown) {
  const headers = where.keys ? `headers = {"Authorization": f"Bearer {os.environ['${KEY}']}"}\n` : "";
  return (
    `import ${where.keys ? "os\n\nimport " : ""}requests\n\n${headers}response = requests.post(\n    ${python(where.url + path)},\n` +
    `${headers ? "    headers=headers,\n" : ""}    json=${python(body, 4)},\n    timeout=300,\n)\nresponse.raise_for_status()\nanswer = response.json()\nprint(${shown})\n`
  );
}
