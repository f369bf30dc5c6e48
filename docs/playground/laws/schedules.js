// Rates as functions of the step, as in jdropout.schedules; rounded to float32 where they are used.

export const constant = (rate) => () => rate;

/** Falls to 0 along a straight line. */
export const early = (rate, cutoff) => (step) => (step >= cutoff ? 0 : rate * (1 - step / cutoff));

/** 0, and from the cutoff on the rate. */
export const late = (rate, cutoff) => (step) => (step >= cutoff ? rate : 0);

export const curriculum = (rate, gamma) => (step) => rate * -Math.expm1(-gamma * step);
