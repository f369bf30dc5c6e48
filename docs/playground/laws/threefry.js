// Threefry-2x32-20, the cipher of every law here. Words are unsigned 32-bit integers.

const ROTATIONS = [13, 15, 26, 6, 17, 29, 16, 24];
const PARITY = 0x1bd11bda;

/** Writes the two words of the cipher into `out`, so that a loop over blocks allocates nothing. */
export function threefryInto(out, key0, key1, counter0, counter1) {
  const key2 = key0 ^ key1 ^ PARITY;
  let x0 = (counter0 + key0) | 0;
  let x1 = (counter1 + key1) | 0;
  for (let turn = 1; turn <= 5; turn++) {
    const first = turn % 2 === 1 ? 0 : 4;
    for (let i = first; i < first + 4; i++) {
      const distance = ROTATIONS[i];
      x0 = (x0 + x1) | 0;
      x1 = ((x1 << distance) | (x1 >>> (32 - distance))) ^ x0;
    }
    const a = turn % 3;
    const b = (turn + 1) % 3;
    x0 = (x0 + (a === 0 ? key0 : a === 1 ? key1 : key2)) | 0;
    x1 = (x1 + (b === 0 ? key0 : b === 1 ? key1 : key2) + turn) | 0;
  }
  out[0] = x0 >>> 0;
  out[1] = x1 >>> 0;
}

export function threefry2x32(key, counter) {
  const out = [0, 0];
  threefryInto(out, key[0], key[1], counter[0], counter[1]);
  return out;
}
