// Lines of Python that make the same masks.

const literal = (part) => (typeof part === "number" ? String(part) : JSON.stringify(part));

export function pythonSite(site) {
  const parts = Array.isArray(site) ? site : [site];
  return parts.length === 1 ? literal(parts[0]) : `(${parts.map(literal).join(", ")})`;
}

export function pythonShape(shape) {
  return shape.length === 1 ? `(${shape[0]},)` : `(${shape.join(", ")})`;
}

export function pythonKey(seed, step, site, microbatch = 0) {
  const part = Number(microbatch) === 0 ? "" : `, microbatch=${microbatch}`;
  return `jdropout.keys.site_key(jax.random.key(${seed}), step=${step}, site=${pythonSite(site)}${part})`;
}

export function pythonMask(key, rate, shape) {
  return `jdropout.keep_mask(${key}, ${rate}, ${pythonShape(shape)})`;
}
