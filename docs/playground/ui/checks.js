// What a reader types: {value}, or {error} with the name of a text and what it mentions.

const NUMBER = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i;

export function checkRate(typed, low, high) {
  const text = typed.trim();
  const value = Number(text);
  if (!NUMBER.test(text) || value < low || value > high)
    return { error: ["badRate", text, low, high] };
  return { value };
}

export function checkWhole(name, typed, limit) {
  const text = typed.trim();
  if (!/^\d+$/.test(text) || BigInt(text) >= limit) {
    return { error: ["badWhole", name, text, limit - 1n] };
  }
  return { value: BigInt(text) };
}

/** A path of names and indices, such as decoder/3/mlp. */
export function checkSite(typed) {
  const parts = typed.trim().split("/");
  if (parts.some((part) => part.trim() === "")) return { error: ["badSite", typed.trim()] };
  const site = parts.map((part) => (/^\d+$/.test(part) ? Number(part) : part));
  const large = site.find((part) => typeof part === "number" && part >= 2 ** 32);
  return large === undefined ? { value: site } : { error: ["badIndex", large] };
}
