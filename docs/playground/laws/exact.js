// Exact arithmetic with doubles as fractions, where a law asks for exact rounding.

/** A double of at least 0 as [numerator, bits]: numerator / 2^bits. */
export function asFraction(x) {
  let bits = 0n;
  while (!Number.isInteger(x)) {
    x *= 2; // exact
    bits += 1n;
  }
  return [BigInt(x), bits];
}

/** numerator / denominator, rounded to the nearest integer, ties to even. */
export function roundedQuotient(numerator, denominator) {
  const floor = numerator / denominator;
  const twice = 2n * (numerator - floor * denominator);
  const up = twice > denominator || (twice === denominator && floor % 2n === 1n);
  return floor + (up ? 1n : 0n);
}
