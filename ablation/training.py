"""How a row of the ablation is trained: its settings, and which of them go together."""

from __future__ import annotations

from dataclasses import dataclass

from ablation.scorers import GRADIENTS, KINDS

SAMPLINGS = ("conventional", "alpha", "compute", "log", "sandwich", "ladder", "truncated", "cuts")
CUTS = ("first", "last", "ends")
ON_CUTS = ("truncated", "cuts")  # samplings of rows that know no dial
STRONGEST = 12.0  # the largest MAC reduction that training draws


@dataclass(frozen=True)
class Training:
    """How a row is trained.

    sampling: what each step draws. "conventional": nothing, alpha = 1; "alpha": alpha ~ U(alpha_range) (Eq. 3);
        "compute": the share of the MACs, uniformly; "log": the MAC reduction, log-uniformly from 1 to STRONGEST;
        "sandwich": alpha = 1, a log-uniform draw and STRONGEST in one step; "ladder": alpha = 1 and a log-uniform draw
        from either half; "truncated": alpha = 1 on inputs cut log-uniformly, by `side`; "cuts": the ladder on cut
        inputs, whole ones and two cuts in one step.
    distill: weight of the divergence from the alpha = 1 pass of the same step (sandwich, ladder and cuts; of whole
        inputs), or from the teacher's verdict, the rest is the labels'.
    teacher: a result of the same task, by its name, whose model (run.py's --weights) has judged each whole text before.
    layers: the model's first layers alone, so many; 0: all of them.
    match: weight of the distance between the last token's final state and that of the alpha = 1 pass, over the latter's
        length, squared.
    deep: match the last token's states behind every layer, in the mean, not only the final one.
    exits: the head answers behind so many depths, too, drawn in every pass (all of them, if there are fewer), each
        taught by the labels and, by `distill`, the last layer's answer of the alpha = 1 pass. (ablation/exits.py)
    exit_share: of the loss, theirs.
    skips: layers left out of the alpha = 1 pass: the probability of the last, 0 of the first, rising in between.
    crops: the share of the texts that a step reads only a random window of, half of their tokens or more.
    probe: "" scores as the variant says; "gradient" learns a linear score per dropping layer on the way, which
        predicts each token's |state x gradient| in the alpha = 1 pass; "wide" the same with a hidden layer,
        "salience" with a table of tokens, too, "wide-phrases" with phrases in the first layer; "words" scores tokens
        by the weights of a bag of words (ablation/words.py), fitted to the same labels beforehand; "evidence" learns
        on the way how much each token tells about the label by itself (see `Evidence`); "both" is evidence in the
        first layer and "gradient" above; "votes" the same, but phrases vote, by what enters the first layer; "told"
        adds what that saw to the kept states; "phrases" scores phrases in the first layer, by gradients as those
        above; "notes" learns notes alone, and the variant's score decides.
    everywhere: gradients teach the probe in pruned passes, too, among the tokens that are left there.
    rivals: the last token, which is kept anyway, is left out of what gradients teach.
    lengths: they teach |state| x |gradient|, not |state x gradient|.
    warm: the first share of the training runs at alpha = 1 only, so that a learned score knows something before it
        decides.
    warmup: the share of the training in which the learning rate rises to its highest, no fewer than 20 steps; from
        there it falls linearly to 0.
    auxiliary: weight of the loss that trains "evidence".
    ahead: epochs in which "evidence" is trained alone beforehand, through the first layers only, the model as it is.
    weakest: the least MAC reduction that "log" draws; every 16th step is then at alpha = 1, lest it be forgotten.
    start: a folder with a trained LoRA adapter to go on from.
    half: compute in bfloat16 on a CPU, too.
    rows: of a pass, padding included; larger batches are split, for the memory's sake.
    lora: rank of adapters on all linear layers, trained in place of the weights; 0 trains the weights. Without dropout
        they are computed as part of the weights, which is faster.
    bends: the schedule is learned on the way (see `Bend`), from the variant's on.
    compute: training ends after so many passes over the data's MACs at alpha = 1 (None: no limit); epochs likewise by
        samples seen: at equal compute the cheaper draws see more samples; and by seconds, for a machine that is lent:
        what comes first ends it, and the learning rate falls to 0 until then.
    """

    sampling: str = "alpha"
    alpha_range: tuple[float, float] = (0.5, 1.0)
    side: str = "ends"
    distill: float = 0.0
    match: float = 0.0
    deep: bool = False
    crops: float = 0.0
    probe: str = ""
    everywhere: bool = False
    rivals: bool = False
    lengths: bool = False
    warm: float = 0.0
    warmup: float = 0.05
    auxiliary: float = 0.3
    ahead: float = 0.0
    weakest: float = 1.0
    start: str = ""
    half: bool = False
    teacher: str = ""
    layers: int = 0
    exits: int = 0
    exit_share: float = 0.5
    skips: float = 0.0
    lora: int = 0
    bends: bool = False
    epochs: float | None = 1.0
    compute: float | None = None
    seconds: float | None = None
    learning_rate: float = 4e-5
    batch_size: int = 32
    rows: int = 16384
    dropout: float = 0.1
    seed: int = 0

    def __post_init__(self):
        if self.sampling not in SAMPLINGS or self.side not in CUTS:
            raise ValueError(f"sampling must be one of {SAMPLINGS} and side one of {CUTS}; got {self}.")
        taught = (self.distill and not self.teacher) or self.match or self.probe in GRADIENTS
        if taught and self.sampling not in ("sandwich", "ladder", "cuts") and not (self.exits and not self.probe):
            raise ValueError(
                f"distill, match and gradients need the alpha = 1 pass of a sandwich or ladder; got {self}."
            )
        if self.sampling in ON_CUTS and (self.match or self.probe):
            raise ValueError(f"match and probe are of the dial, which inputs that are cut do not know; got {self}.")
        if self.teacher and not (self.distill and self.sampling == "conventional"):
            raise ValueError(f"a teacher needs distill > 0, and conventional sampling; got {self}.")
        if self.layers < 0 or (self.layers and self.sampling not in ("conventional", "alpha")):
            raise ValueError(
                f"layers must be 0 or more, and fewer than all are for sampling conventional or alpha; got {self}."
            )
        if self.rows < 1:
            raise ValueError(f"rows of a pass must be 1 or more; got {self}.")
        if not 0 < self.warmup < 1:
            raise ValueError(f"warmup is a share of the training, above 0 and below 1; got {self}.")
        if self.exits and (self.teacher or self.layers or self.sampling not in ("conventional", "ladder")):
            raise ValueError(f"exits teach themselves, in conventional or ladder steps of all layers; got {self}.")
        if self.skips and not self.exits:
            raise ValueError(f"skips are of a training with exits; got {self}.")
        if self.bends and not self.distill:
            raise ValueError(f"bends needs distill > 0: the divergence from the alpha = 1 pass; got {self}.")
        if self.probe not in KINDS or (self.epochs is None and self.compute is None):
            raise ValueError(f"probe must be one of {KINDS}, epochs or compute must be given; got {self}.")
