"""README's table of pruning methods, with the figures of bench/results/prune_antiberty.json and prune_mnist.json."""

from __future__ import annotations

from typing import Any, NamedTuple

SPARSITY = 0.95  # of the MNIST figures


class Bert(NamedTuple):
    """A row of bench.prune_antiberty, and what to call it here."""

    row: str
    label: str


class Mnist(NamedTuple):
    """A method of bench.prune_mnist."""

    method: str
    label: str = ""


# Method; how, what or when; the formats that its masks feed; where it was measured.
METHODS: tuple[tuple[str, str, str, tuple[Bert | Mnist, ...]], ...] = (
    (
        "magnitude, L1, L2, Lp",
        "how: weights alone",
        "all",
        (Bert("2:4 magnitude", "2:4"), Bert("50 % magnitude", "50 %"), Bert("80 % magnitude", "80 %")),
    ),
    ("random", "how: the control", "all", (Bert("2:4 random", "2:4"), Mnist("random"))),
    ("SNIP, Taylor, gradient, OBD", "how: gradients of a loss", "all", (Mnist("SNIP", "SNIP"),)),
    (
        "Wanda, RIA",
        "how: weights × activations",
        "all",
        (Bert("2:4 Wanda", "2:4 Wanda"), Bert("2:4 RIA", "2:4 RIA")),
    ),
    ("activation, APoZ, BatchNorm scale, FPGM, HRank", "how: one score a channel", "smaller dense layers", ()),
    (
        "SparseGPT, OBS, refit",
        "how, and updates what stays",
        "sp24, csr, bitmap, bsr",
        (
            Bert("2:4 SparseGPT", "2:4"),
            Bert("2:4 SparseGPT, sequential", "2:4 block by block"),
            Bert("50 % SparseGPT", "50 %"),
            Bert("80 % SparseGPT", "80 %"),
            Bert("16x16 blocks 50 % SparseGPT", "16 × 16 blocks 50 %"),
        ),
    ),
    (
        "SparseGPT's mask only",
        "how: the update thrown away, as a control",
        "sp24",
        (Bert("2:4 SparseGPT, mask only", "2:4"),),
    ),
    ("Wanda++", "how: regional gradients, and updates what stays", "sp24, csr, bitmap", (Bert("2:4 Wanda++", "2:4"),)),
    (
        "`quantise_`, GPTQ-style in the same sweep",
        "how: int8, e4m3 of what stays",
        "sp24, bsr",
        (Bert("2:4 SparseGPT, int8 in the sweep", "2:4 int8"),),
    ),
    (
        '`NM(keep, group, axis, order)`, "2:4"',
        "what: N of every M",
        "sp24 (2:4), csr, bitmap",
        (Bert("4:8 magnitude", "4:8 magnitude"), Bert("4:8 SparseGPT", "4:8 SparseGPT")),
    ),
    ("`Transposable`", "what: 2:4 along rows and columns", "sp24, forward and backward", ()),
    ("`permute_`", "what: another order of channels, so that N:M keeps more", "sp24", ()),
    ("`Unstructured` (layer, row, global, `min_keep`)", "what: any place", "csr, bitmap", (Mnist("one-shot"),)),
    (
        "`Block`, `Vector`",
        "what: rectangles, rows, columns",
        "bsr",
        (Bert("16x16 blocks 50 % magnitude", "16 × 16 blocks 50 %"),),
    ),
    (
        "`Channels`, `Heads` + `shrink_`, `Layers`",
        "what: cut out of the model, dependencies followed",
        "smaller dense layers",
        (Mnist("filters", "`Channels`"),),
    ),
    ("`OneShot`", "when: after training, then tuned", "all", (Mnist("one-shot"),)),
    ("`Iterative`", "when: in rounds of pruning and tuning", "all", (Mnist("iterative"),)),
    ("`Gradual`", "when: along a cubic while training", "all", (Mnist("gradual"),)),
    ("`Ice`", "when: tuned only where it is needed", "all", ()),
    (
        "`LotteryTicket`",
        "when: train, prune, rewind to step k",
        "all",
        (Mnist("lottery ticket", "ticket"), Mnist("ticket, new weights", "the mask with new weights")),
    ),
    (
        "`RigL`, `SET`",
        "when: sparse from the start, dropped and grown",
        "csr, bitmap; bsr with `Block`",
        (Mnist("RigL", "`RigL`"),),
    ),
    ("`LearnableMask`, movement, `sr_ste_`", "when: the mask is trained", "sp24, csr, bitmap, bsr", ()),
    (
        "distillation",
        "beside any schedule",
        "all",
        (
            Bert("16x16 blocks 50 % SparseGPT, distilled", "16 × 16 blocks 50 %, 15 min"),
            Bert("80 % SparseGPT, distilled", "80 %, 15 min"),
        ),
    ),
    ("`l1`, `group_lasso`, `bn_l1`", "beside the loss", "–", ()),
)


def rows(bert: dict[str, Any], mnist: dict[str, Any]) -> list[list[str]]:
    """Method, how/what/when, formats, accuracy, speed; KeyError where a method was not measured."""
    made = []
    for method, kind, formats, sources in METHODS:
        cells = [_bert(bert, s) if isinstance(s, Bert) else _mnist(mnist, s) for s in sources]
        accuracy, speed = ("; ".join(cell[i] for cell in cells if cell[i]) for i in (0, 1))
        made.append([method, kind, formats, accuracy or "in the tests", speed])
    return made


def heading(bert: dict[str, Any], mnist: dict[str, Any]) -> str:
    """What the figures are, and what the dense models have."""
    (dense,) = (r for r in bert["rows"] if r["method"] == "dense")
    accuracy, half = (100 * mnist["dense"][k] for k in ("accuracy", "half_interval"))
    seeds = mnist["effort"]["seeds"]
    return (
        f"Perplexity of the BERT at masked residues (dense {dense['perplexity']:.3f}; least and most of the "
        f"calibration seeds) and its speed at 1 and at 128 tokens against dense; accuracy of the MNIST network with "
        f"{100 * SPARSITY:.0f} % pruned (dense {accuracy:.1f} ± {half:.1f} %, {seeds} seeds, 95 % interval) and its "
        f"speed, {mnist['effort']['images']} images. Whole models, converted, fp32, {_threads(bert)} and "
        f"{_threads(mnist)}; ~: within the noise."
    )


def _threads(result: dict[str, Any]) -> str:
    threads = result["machine"]["threads"]
    return f"{threads} threads" if threads > 1 else "one thread"


def _bert(result: dict[str, Any], source: Bert) -> tuple[str, str]:
    found = [r for r in result["rows"] if r["method"] == source.row]
    if not found:
        raise KeyError(source.row)
    values = sorted({f"{r['perplexity']:.3f}" for r in found}, key=float)
    times = next((r["times"] for r in found if r["times"]), {})
    speed = " / ".join(f"{'' if t['beyond_noise'] else '~'}{t['speedup']:.2f}×" for t in times.values())
    return f"{source.label} {'–'.join(values[:1] + values[1:][-1:])}", f"{source.label} {speed}" if speed else ""


def _mnist(result: dict[str, Any], source: Mnist) -> tuple[str, str]:
    (row,) = (r for r in result["results"] if (r["method"], r["sparsity"]) == (source.method, SPARSITY))
    label = f"{source.label} " if source.label else ""
    accuracy = f"MNIST {label}{100 * row['accuracy']:.1f} ± {100 * row['half_interval']:.1f} %"
    return accuracy, f"MNIST {label}{row['speed']['speedup']:.2f}×"
