// Threefry-2x32-20, the cipher of every law here. Words are unsigned 32-bit integers.

const PARITY = 0x1bd11bda;

/** Writes the two words of the cipher into `out`, so that a loop over blocks allocates nothing. */
export function threefryInto(out, key0, key1, counter0, counter1) {
  const keys = [key0, key1, key0 ^ key1 ^ PARITY];
  let x0 = (counter0 + key0) | 0;
  let x1 = (counter1 + key1) | 0;
  for (let turn = 1; turn <= 5; turn++) {
    const odd = turn % 2 === 1; // rotations 13, 15, 26, 6 take turns with 17, 29, 16, 24
    x0 = (x0 + x1) | 0;
    x1 = (odd ? (x1 << 13) | (x1 >>> 19) : (x1 << 17) | (x1 >>> 15)) ^ x0;
    x0 = (x0 + x1) | 0;
    x1 = (odd ? (x1 << 15) | (x1 >>> 17) : (x1 << 29) | (x1 >>> 3)) ^ x0;
    x0 = (x0 + x1) | 0;
    x1 = (odd ? (x1 << 26) | (x1 >>> 6) : (x1 << 16) | (x1 >>> 16)) ^ x0;
    x0 = (x0 + x1) | 0;
    x1 = (odd ? (x1 << 6) | (x1 >>> 26) : (x1 << 24) | (x1 >>> 8)) ^ x0;
    x0 = (x0 + keys[turn % 3]) | 0;
    x1 = (x1 + keys[(turn + 1) % 3] + turn) | 0;
  }
  out[0] = x0 >>> 0;
  out[1] = x1 >>> 0;
}

export function threefry2x32(key, counter) {
  const out = [0, 0];
  threefryInto(out, key[0], key[1], counter[0], counter[1]);
  return out;
}
