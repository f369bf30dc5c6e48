// The page in English. `Backticks` mark code.

export const EN = {
  title: "Dropout playground",
  lead: "Dropout switches units off at random while a network trains, and scales the others up. Here you can watch it happen: everything on this page is computed in your browser, with the same random bits that the `jdropout` library gives in Python.",
  language: "Language",
  contents: "Contents",
  skip: "Skip to the experiments",
  seed: "Seed",
  seedNote:
    "The seed of everything below. Another seed gives other masks, other data and other networks; the same seed gives the same ones again.",
  importsNote:
    "Each experiment shows a line of Python that gives the same mask. The lines need this import:",
  copy: "Copy",
  copied: "Copied",
  selected: "Selected: copy it with your keyboard",
  pause: "Pause",
  clear: "Start over",
  restart: "Start over",
  train: "Train",
  trainAgain: "Train again",
  rate: "Rate: probability of dropping",
  rateSlider: "Rate, as a slider",
  rateA: "First rate",
  rateASlider: "First rate, as a slider",
  rateB: "Second rate",
  rateBSlider: "Second rate, as a slider",
  galleryRate: "Rate of all panels",
  galleryRateSlider: "Rate of all panels, as a slider",
  step: "Step",
  microbatch: "Microbatch",
  site: "Site: names and numbers, with / between them",
  deterministic: "`deterministic=True`: evaluation, nothing is dropped",
  kept: "kept",
  dropped: "dropped",
  bits: (hex) => `Mask bits, row by row: \`${hex}\``,
  stepOf: (step, steps) => `step ${step} of ${steps}`,
  inputX: "input x",
  outputY: "output y",
  stepX: "training step",
  lossY: "log₁₀ of the loss",
  errorY: "log₁₀ of the error",
  rateY: "rate",
  lossEmpty: "No step has been trained yet.",
  lossPicture: (steps, loss) => `Training loss over ${steps} steps. The last one is ${loss}.`,
  legendData: "training data",
  legendTruth: "the true curve",
  legendMean: "mean of the masks",
  legendBand: "± 2 standard deviations of the masks",
  legendOff: "dropout off",
  legendRight: "right",
  legendWrong: "with the mistake",

  badRate: (got, low, high) =>
    `The rate must be a number from ${low} to ${high}, got “${got}”. It is the probability of dropping: type 0.4, for example. Until then the last good rate stays.`,
  badWhole: (name, got, most) =>
    `The ${EN[name].toLowerCase()} must be a whole number from 0 to ${most}, got “${got}”. Type 3, for example. Until then the last good one stays.`,
  badSite: (got) =>
    `A site needs a name or a number in each place, got “${got}”. Type decoder/3/mlp, for example. Until then the last good one stays.`,
  badIndex: (got) =>
    `A number in a site must be below 2³², got “${got}”. Type a smaller one, or add a letter to make it a name.`,

  scaleTitle: "100, then 60, then 100 again",
  scaleTry: "Press Run: single masks differ, but with scaling they are right on average.",
  scaleRun: "Run",
  scaleNext: "One mask",
  scaleOff: "dropout off: 100",
  scaleUnscaled: "dropped, not scaled",
  scaleScaled: "dropped and scaled",
  scaleX: "what the neuron receives",
  scaleY: "masks",
  scaleUnits: (kept, scale) =>
    `100 units: ${kept} kept with value ${scale}, ${100 - kept} dropped.`,
  scaleEmpty: "Histogram of sums, empty so far.",
  scaleHistogram: (masks, unscaled, scaled) =>
    `Histogram over ${masks} masks. Mean of the sums: ${unscaled} without scaling, ${scaled} with scaling.`,
  scaleMeans: (masks, unscaled, scaled, limit, of, scale) =>
    `Mean over ${masks} masks: ${unscaled} without scaling, ${scaled} with. A unit is kept where its random number is below ${limit} of ${of}; the scale is the exact inverse of that, ${scale.toPrecision(8)}.`,
  scaleLaw: (limit, of, scale) =>
    `A neuron adds up 100 units of 1, through weights of 1. A unit is kept where its random number is below ${limit} of ${of}; the scale is the exact inverse of that, ${scale.toPrecision(8)}.`,
  scaleDrawn: (kept, scaled) => `${kept} of 100 units kept; scaled, the sum is ${scaled}.`,
  scaleNoBits: "In evaluation no mask is drawn. The output is the input itself: 100, every time.",

  stripTitle: "Each mask is another network",
  stripTry:
    "Press Next eight: every training step trains a different thinned network, and all of them share their weights.",
  stripNext: "Next eight",
  stripDropped: "dropped, with all its connections",
  stripStep: (step) => `step ${step}`,
  stripNetwork: (bits) => `Network with two hidden layers; units kept: ${bits}.`,
  stripSeen: (steps, seen, all) =>
    `${steps} steps, ${seen} different networks out of ${all} possible ones.`,

  bandTitle: "A band that opens where there is no data",
  bandTry:
    "Press Train: then keep dropout on and ask many masks, which disagree most where they have seen nothing.",
  bandSingles: "Show six single masks",
  bandPicture: (step, loss, data, gap, far) =>
    `Regression after ${step} steps, with a gap in the data between -0.5 and 0.5. Mean squared error ${loss}. Standard deviation of the masks: ${data} among the data, ${gap} in the middle of the gap, ${far} beyond the data.`,
  bandNote: (step, first, loss, data, gap, far) =>
    step
      ? `Mean squared error on the data: ${first} at the start, ${loss} after ${step} steps. Standard deviation of the masks: ${data} among the data, ${gap} in the middle of the gap, ${far} beyond the data. The band is what 60 masks say, not a guarantee: it may miss the true curve.`
      : `A network with two hidden layers of 64 units, 30 points, and a gap between -0.5 and 0.5. The standard deviation of the masks is ${data} among the data and ${gap} in the gap: untrained, the band says nothing.`,

  mistakesTitle: "Three things to forget",
  mistakesTry:
    "Choose a mistake and train: both networks see the same data, and only one of them is right.",
  mistakesTrain: "Train both",
  mistake: "Forget",
  "mistake-scale": "the scale",
  "mistake-key": "the key",
  "mistake-flag": "the flag",
  "mistakes-scale-before":
    "Units are zeroed in training, but the others are not scaled. In evaluation all units are there, so each layer gets more than it is used to.",
  "mistakes-key-before":
    "The key does not depend on the step, so each example has the same mask at every step, and trains only one network of its own.",
  "mistakes-flag-before":
    "Training is right, but dropout stays on in evaluation: each call gives another answer. Three calls are drawn.",
  "mistakes-scale-note": (step, right, wrong) =>
    `Error in evaluation after ${step} steps: ${right} if done right, ${wrong} without the scale. In evaluation all units are there, so each layer gets more than it is used to, and the curve is stretched.`,
  "mistakes-key-note": (step, right, wrong, rightLoss, wrongLoss) =>
    `Error in evaluation after ${step} steps: ${right} if done right, ${wrong} with one key for all steps. Each example has trained a network of its own, and the whole network never. The training loss tells nothing: ${rightLoss} if done right, ${wrongLoss} with the mistake.`,
  "mistakes-flag-note": (step, right, wrong) =>
    `Error in evaluation after ${step} steps: ${right} if done right, ${wrong} on average with dropout left on. The same network gives another answer at each call; three are drawn.`,
  mistakesPicture: (step, right, wrong) =>
    `Two regressions after ${step} steps. Error in evaluation: ${right} for the right one, ${wrong} for the one with the mistake.`,
  codeWrong: "with the mistake",
  codeRight: "right",

  schedulesTitle: "Early and late",
  schedulesTry:
    "Move the cutoff, then train: the rate may change from step to step, and five networks race with five schedules.",
  schedulesTrain: "Train all five",
  cutoff: "Cutoff of early and late, a step",
  cutoffAt: (step) => `Cutoff of early and late: step ${step}`,
  "schedule-none": "none",
  "schedule-constant": "constant",
  "schedule-early": "early",
  "schedule-late": "late",
  "schedule-curriculum": "curriculum",
  schedule: "schedule",
  rateNow: "rate now",
  errorTrain: "error on the data",
  errorTest: "error to the true curve",
  schedulesTable: "Mean squared errors, with dropout off",
  schedulesRates: (rate, cutoff, steps) =>
    `Rates over ${steps} steps: none stays at 0, constant at ${rate}; early falls from ${rate} to 0 at step ${cutoff}; late jumps from 0 to ${rate} there; curriculum rises from 0 towards ${rate}.`,
  schedulesErrors: (step, list) => `Errors to the true curve after ${step} steps: ${list}.`,
  schedulesBefore:
    "20 noisy points: enough to learn the curve, few enough to learn the noise. With one key a higher rate drops the same units and more, so another schedule never reshuffles the masks of a step.",
  schedulesNote: (best, error) =>
    `With this seed ${best} ends closest to the true curve (${error}). Try other seeds before you believe it: one run on 20 points decides nothing.`,

  nestedTitle: "One key, two rates",
  nestedTry:
    "Move either slider: of one key, the higher rate drops everything that the lower rate drops, and more.",
  nestedBoth: "kept at both rates",
  nestedOne: "dropped only at the higher rate",
  nestedNone: "dropped at both",
  nestedPicture: (low, high, both, one, none, never) =>
    `240 units at rates ${low} and ${high}: ${both} kept at both, ${one} dropped only at the higher rate, ${none} dropped at both, ${never} dropped only at the lower rate.`,
  nestedNote: (low, high, both, one, none, never) =>
    `Kept at both: ${both}. Dropped only at ${high}: ${one}. Dropped at both: ${none}. Dropped at ${low} but kept at ${high}: ${never}, always. Each unit has one random number, and a rate is only the line it is compared with.`,

  keysTitle: "Keys from step and site",
  keysTry:
    "Press Next step, or type another site: no state is carried along, so a training that stops and resumes finds the same masks.",
  keysNext: "Next step",
  keysTable: "How the key is derived",
  keysLevel: "level",
  keysWords: "key, in hexadecimal words",
  keysRoot: (seed) => `seed ${seed}`,
  keysStep: (step, microbatch) => `step ${step}, microbatch ${microbatch}`,
  keysPart: (part) => (typeof part === "number" ? `index ${part}` : `name “${part}”`),
  keysCaption: (step) => `step ${step}`,
  keysPicture: (step, kept) => `Mask of step ${step}: ${kept} of 100 units kept.`,
  keysNote: (same, expected) =>
    `The masks of these two steps agree in ${same} of 100 places; independent masks at this rate agree in about ${expected}.`,

  galleryTitle: "The family",
  galleryTry:
    "Move the rate: every function of the library that drops, replaces or disturbs, applied to ones.",
  galleryDropped: "0: dropped",
  galleryOne: "1: unchanged",
  galleryScaled: "above 1",
  galleryNegative: "below 0",
  galleryReplaced: "replaced, or not updated",
  galleryLeftOut: "left out",
  python: "Python",
  panelPicture: (called, what, kept, all) =>
    `${called}, ${what}: ${kept} of ${all} cells are not zero.`,
  "group-axes": "Elements, and masks shared along axes",
  "group-branches": "Branches, layers and updates",
  "group-regions": "Regions",
  "group-subsets": "Exact numbers",
  "group-words": "Words and weights",
  "group-noise": "Noise",
  "group-values": "Other values, other probabilities",
  "panel-dropout": "each element",
  "panel-broadcast": "a feature, in all examples",
  "panel-spatial": "a channel’s whole map",
  "panel-locked": "a feature, at all time steps",
  "panel-path": "all of an example",
  "panel-pathBatch": "the whole batch",
  "panel-layer": "a whole layer, which does not run",
  "panel-zoneout": "a unit keeps its old state",
  "panel-block1": "runs of 3 in a sequence",
  "panel-block2": "squares, the same in all channels",
  "panel-blockChannels": "squares, different in each channel",
  "panel-patch": "an exact number of 16 patches",
  "panel-subset": "an exact number of 16 elements",
  "panel-subsetGroups": "an exact number of every 4 elements",
  "panel-strata": "a unit in its share of 10 samples",
  "panel-word": "each word, but never padding",
  "panel-embedding": "a word, wherever it occurs",
  "panel-connect": "each weight, for all examples",
  "panel-targeted": "each weight of the smaller half",
  "panel-gaussian": "times normal noise",
  "panel-gaussianNoise": "plus normal noise",
  "panel-uniformNoise": "plus uniform noise",
  "panel-variational": "times noise of learned strength",
  "panel-alpha": "each element: to SELU’s floor",
  "panel-featureAlpha": "a channel’s whole map",
  "panel-standout": "by its own activation",
  "panel-concrete": "smooth, to learn the rate",
  "axes-dropout": "rows: examples; columns: features",
  "axes-broadcast": "rows: examples; columns: features",
  "axes-spatial": "2 examples of 5 channels",
  "axes-locked": "rows: time; columns: features, in 3 examples",
  "axes-path": "rows: examples; columns: features",
  "axes-pathBatch": "rows: examples; columns: features, in 4 training steps. Python: the first",
  "axes-layer": "rows: layers; columns: training steps. Python: the first cell",
  "axes-zoneout": "rows: units; columns: time. Python: the first column",
  "axes-block1": "rows: examples; columns: time",
  "axes-block2": "2 channels of a map",
  "axes-blockChannels": "2 channels of a map",
  "axes-patch": "8 examples of 4 × 4 patches. Python: which are kept",
  "axes-subset": "rows: subsets; columns: elements. Python: which are kept",
  "axes-subsetGroups": "rows: subsets; columns: elements. Python: which are kept",
  "axes-strata": "rows: coupled samples; columns: units",
  "axes-word": "rows: sentences. Python: 0 where a word would be replaced",
  "axes-embedding": "rows: words of the vocabulary; columns: features",
  "axes-connect": "rows: inputs; columns: units",
  "axes-targeted": "rows: inputs; columns: units; area: the weight",
  "axes-gaussian": "inputs of 0 at the left, of 1 at the right",
  "axes-gaussianNoise": "inputs of 0 at the left, of 1 at the right",
  "axes-uniformNoise": "inputs of 0 at the left, of 1 at the right",
  "axes-variational": "columns: from low to high alpha; no rate",
  "axes-alpha": "rows: examples; columns: features",
  "axes-featureAlpha": "2 examples of 5 channels",
  "axes-standout": "columns: from low to high activation",
  "axes-concrete": "rows: examples; columns: features",

  home: "The documentation of jdropout",
  exactTitle: "What is exact here",
  exactYes: "Bit for bit the library’s",
  exactYesText:
    "Masks, thresholds, keys, subsets and coupled samples: integer arithmetic, checked against the library’s published known answers. A line of Python on this page gives the mask that is used next to it.",
  exactNo: "Not bit for bit",
  exactNoText:
    "Noise, which goes through logarithms and square roots, agrees to about six digits. Training here is plain JavaScript in 64-bit floating point; JAX trains in 32 bits and with other initial values, so losses and curves differ, though masks do not.",
};
