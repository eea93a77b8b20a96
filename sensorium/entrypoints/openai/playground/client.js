// The server's API as this page uses it. Paths are relative, so that the page works behind a prefix too.

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

let apiKey = ""; // in memory only

export function setApiKey(key) {
  apiKey = key.trim();
}

async function request(path, body, signal) {
  const headers = { Accept: "application/json" };
  if (apiKey) headers.Authorization = `Bearer ${apiKey}`;
  const options = { headers, signal, credentials: "omit", cache: "no-store" };
  if (body !== undefined) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server can't be reached.", 0);
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  let message = `The server answered with status ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // not one of this server's own answers, for example that of a proxy
  }
  return new ServerError(message, response.status);
}

// [{id, limit_mm_per_prompt, max_model_len}]
export async function models() {
  return (await (await request("v1/models")).json()).data;
}

// {prompt_tokens, media_tokens: {image: [49, 64]}, max_model_len}
export async function tokenCost(model, messages, signal) {
  return (await request("v1/chat/token_cost", { model, messages }, signal)).json();
}

// Yields the chunks of an answer. Leaving the loop, or aborting the signal, ends the request on the server.
export async function* chat(body, signal) {
  const options = { stream: true, stream_options: { include_usage: true } };
  const response = await request("v1/chat/completions", { ...body, ...options }, signal);
  let isDone = false;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") {
        isDone = true;
        return;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(chunk.error.message, response.status);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof TypeError) throw new ServerError("The connection to the server broke off.", 0);
    throw error;
  }
  if (!isDone) throw new ServerError("The connection to the server broke off.", 0);
}

// The data of each server-sent event of a stream of bytes.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } finally {
    reader.cancel().catch(() => {}); // may have failed already
  }
}
