/* An agent of Node's `openai` client with two tools. Prints one line of JSON: its last answers.
   argv: the folder of node_modules, the server's URL, the question, the tools' functions. */
import { createRequire } from "node:module";

const [folder, baseURL, question, functions] = process.argv.slice(2);
const { OpenAI } = createRequire(`${folder}/`)("openai");
const client = new OpenAI({ baseURL: `${baseURL}/v1`, apiKey: "none", maxRetries: 0 });
const results = { weather: ({ city }) => `21 degrees in ${city}`, clock: ({ zone }) => `noon in ${zone}` };

/* Over chat completions, by the client's own loop. */
async function chat(stream) {
  const tools = JSON.parse(functions).map(tool => ({
    type: "function", function: { ...tool, parse: JSON.parse, function: results[tool.name] },
  }));
  const messages = [{ role: "user", content: question }];
  return client.chat.completions.runTools({ model: "any", messages, tools, stream }).finalContent();
}

async function responses(stream) {
  const tools = JSON.parse(functions).map(tool => ({ type: "function", ...tool }));
  const input = [{ role: "user", content: question }];
  for (;;) {
    const body = { model: "any", input, tools };
    const response = await (stream ? client.responses.stream(body).finalResponse() : client.responses.create(body));
    const calls = response.output.filter(item => item.type === "function_call");
    if (!calls.length) return response.output_text;
    input.push(...response.output, ...calls.map(({ call_id, name, arguments: text }) => (
      { type: "function_call_output", call_id, output: results[name](JSON.parse(text)) })));
  }
}

console.log(JSON.stringify([await chat(false), await chat(true), await responses(false), await responses(true)]));
