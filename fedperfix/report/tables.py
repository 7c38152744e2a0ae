"""Tables: what a row is, and how it looks in Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from fedperfix.report.runs import ReportedRun
from fedperfix.report.statistics import Comparison, half_width

DASH = "–"


@dataclass(frozen=True)
class Summary:
    """A row's figures: accuracies in percent, means over seeds; None where no run has the figure.

    Args:
        row: what it is called.
        seeds: how many runs it has.
        of_seeds: which, in ascending order.
        tested: as `ReportedRun.columns`, and over how many clients drawn at random, if not over all.
        unfinished: how many of them have not all their rounds.
        round: the last evaluated round, the smallest over seeds.
        accuracy: mean over all clients in the last evaluated round, with the global parameters and each one's own.
        accuracy_ci95: half the width of its 95 % confidence interval over seeds (Student's t).
        std, worst, weighted: the population's standard deviation over clients, the mean of the worst tenth, the
            mean over images.
        auc, f1: means over clients, percent.
        authors: mean over all clients as the authors' released code tests them, where that was measured.
        local: after local training, over the clients that were sampled in that round.
        best, best_rounds: the highest mean over clients in any evaluated round, and in which, by seed.
        bytes_per_round: up and down together, mean over rounds.
        seconds: of a whole run, the median.
        published: what somebody else reports for this row.
    """

    row: str
    seeds: int
    of_seeds: str
    tested: str
    unfinished: int
    round: int
    accuracy: float
    accuracy_ci95: float | None
    std: float
    worst: float
    weighted: float
    auc: float | None
    f1: float | None
    authors: float | None
    local: float
    best: float
    best_rounds: str
    bytes_per_round: float
    seconds: float
    parameters_stored: float | None
    parameters_sent: float | None
    flops_per_image: float | None
    published: float | None

    @classmethod
    def of(cls, row: str, runs: Sequence[ReportedRun], published: float | None = None) -> Summary:
        """The figures of a row's runs, one per seed."""
        accuracies = [run.last["mean"] for run in runs]
        return cls(
            row=row,
            seeds=len(runs),
            of_seeds=" ".join(str(seed) for seed in sorted(run.config.seed for run in runs)),
            tested=" ".join(dict.fromkeys(_tested(run) for run in runs)),
            unfinished=sum(not run.finished for run in runs),
            round=min(run.last["round"] for run in runs),
            accuracy=statistics.mean(accuracies),
            accuracy_ci95=half_width(accuracies),
            std=_mean(run.last["std"] for run in runs),
            worst=_mean(run.last["worst"] for run in runs),
            weighted=_mean(run.last["weighted"] for run in runs),
            auc=_mean_if_any(run.last.get("auc") for run in runs),
            f1=_mean_if_any(run.last.get("f1") for run in runs),
            authors=_mean_if_any(run.last.get("mixed_mean") for run in runs),
            local=_mean(run.last["local_mean"] for run in runs),
            best=_mean(run.best["mean"] for run in runs),
            best_rounds=" ".join(str(run.best["round"]) for run in runs),
            bytes_per_round=_mean(statistics.mean(sent(line) for line in run.rounds) for run in runs),
            seconds=statistics.median(sum(map(seconds, run.rounds)) for run in runs),
            parameters_stored=_mean_if_any(run.costs.get("parameters_stored") for run in runs),
            parameters_sent=_mean_if_any(run.costs.get("parameters_sent_up") for run in runs),
            flops_per_image=_mean_if_any(run.costs.get("flops_forward_per_image") for run in runs),
            published=published,
        )


def sent(line: Mapping[str, float]) -> float:
    """Bytes that a round sent, up and down."""
    return line["bytes_up"] + line["bytes_down"]


def seconds(line: Mapping[str, float]) -> float:
    """Seconds of a round, with its evaluation."""
    return sum(line[f"seconds_{phase}"] for phase in ("train", "aggregate", "evaluate", "other"))


@dataclass(frozen=True)
class Table:
    """A table of texts; the first column is left-aligned, the others right."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """As lines of a Markdown page."""
        ruler = ["---", *("---:" for _ in self.columns[1:])]
        lines = [self.columns, ruler, *self.rows]
        return (
            "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"
        )

    def latex(self) -> str:
        """As a `tabular` with the rules of the booktabs package."""
        head, *rows = (" & ".join(map(_latex, line)) + r" \\" for line in (self.columns, *self.rows))
        lines = [
            r"\begin{tabular}{l" + "r" * (len(self.columns) - 1) + "}",
            r"\toprule",
            head,
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
        ]
        return "\n".join(lines) + "\n"


def accuracy_table(rows: Sequence[Summary], missing: Mapping[str, float]) -> Table:
    """The table of results; columns that no row has are left out.

    Args:
        rows: measured.
        missing: rows that are published and not measured here.
    """
    columns = {
        "method": [item.row + (" *" if item.unfinished else "") for item in rows],
        "seeds": [str(item.seeds) for item in rows],
        "accuracy": [_plus_minus(item.accuracy, item.accuracy_ci95, best=item is _leader(rows)) for item in rows],
        "published": [_number(item.published) for item in rows],
        "std": [_number(item.std) for item in rows],
        "worst 10 %": [_number(item.worst) for item in rows],
        "AUC": [_number(item.auc) for item in rows],
        "macro-F1": [_number(item.f1) for item in rows],
        "by the authors' code": [_number(item.authors) for item in rows],
        "after local training": [_number(item.local) for item in rows],
        "best (round)": [f"{item.best:.2f} ({item.best_rounds.replace(' ', ', ')})" for item in rows],
    }
    if missing:
        for name, cells in columns.items():
            fill = {"method": list(missing), "published": list(map(_number, missing.values()))}
            cells += fill.get(name, [DASH] * len(missing))
    return _table(columns)


def cost_table(rows: Sequence[Summary]) -> Table:
    """What each row stores, sends and takes."""
    return _table(
        {
            "method": [item.row for item in rows],
            "parameters per client": [_whole(item.parameters_stored) for item in rows],
            "of them sent": [_whole(item.parameters_sent) for item in rows],
            "MB per round": [f"{item.bytes_per_round / 1e6:,.2f}" for item in rows],
            "GFLOP per image": [_number(item.flops_per_image and item.flops_per_image / 1e9) for item in rows],
            "seconds": [f"{item.seconds:,.0f}" for item in rows],
        }
    )


def domain_table(rows: Mapping[str, Sequence[ReportedRun]]) -> Table | None:
    """Mean accuracy over the clients of each domain, then over seeds; None where clients have no domains."""
    domains = sorted({client.domain for runs in rows.values() for run in runs for client in run.clients.values()})
    if domains in ([], [""]):
        return None

    def cell(runs: Sequence[ReportedRun], domain: str) -> str:
        chosen = [[c.accuracy for c in run.clients.values() if c.domain == domain] for run in runs]
        return _number(_mean_if_any(statistics.mean(values) if values else None for values in chosen))

    columns = {domain or "none": [cell(runs, domain) for runs in rows.values()] for domain in domains}
    return _table({"method": list(rows)} | columns)


def comparison_table(reference: str, rows: Sequence[Comparison]) -> Table:
    """The paired tests."""
    return _table(
        {
            f"{reference} against": [item.row for item in rows],
            "difference": [f"{item.difference:+.2f}" for item in rows],
            "ahead in": [f"{100 * item.better:.0f} %" for item in rows],
            "pairs": [str(item.pairs) for item in rows],
            "p, Wilcoxon": [_p(item.p_clients) for item in rows],
            "p, with Holm": [_p(item.p_holm) for item in rows],
            "seeds": [str(item.seeds) for item in rows],
            "p, t over seeds": [_p(item.p_seeds) for item in rows],
        }
    )


def as_csv(items: Sequence[object], kind: type) -> str:
    """Records of a dataclass as CSV with plain numbers; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([item.name for item in fields(kind)])  # type: ignore[arg-type]
    for item in items:
        writer.writerow(asdict(item).values())  # type: ignore[call-overload]
    return text.getvalue()


def _table(columns: Mapping[str, Sequence[str]]) -> Table:
    kept = {name: cells for name, cells in columns.items() if any(cell != DASH for cell in cells)}
    return Table(tuple(kept), tuple(zip(*kept.values(), strict=True)))


def _leader(rows: Sequence[Summary]) -> Summary:
    """The best among the rows with the most seeds, the same ones, that were tested alike after as many rounds."""

    def circumstances(item: Summary) -> tuple[str, str, int]:
        return item.of_seeds, item.tested, item.round

    first = max(rows, key=lambda item: (item.seeds, item.tested.startswith("all")))
    return max(
        (item for item in rows if circumstances(item) == circumstances(first)), key=lambda item: item.accuracy
    )


def _tested(run: ReportedRun) -> str:
    number = run.last.get("tested_clients")
    return run.columns if number is None else f"{run.columns}-{number}"


def _mean(values: Iterable[float]) -> float:
    return statistics.mean(values)


def _mean_if_any(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.mean(there) if there else None


def _number(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}"


def _whole(value: float | None) -> str:
    return DASH if value is None else f"{value:,.0f}"


def _plus_minus(value: float, half: float | None, best: bool) -> str:
    text = f"{value:.2f}" + ("" if half is None else f" ± {half:.2f}")
    return f"**{text}**" if best else text


def _p(value: float | None) -> str:
    if value is None:
        return DASH
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


_LATEX = {
    "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "±": r"$\pm$", "–": "--", "<": "$<$", "{": r"\{",
    "}": r"\}", "\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}",
}  # fmt: skip


def _latex(text: str) -> str:
    if text.startswith("**"):
        return r"\textbf{" + _latex(text.strip("*")) + "}"
    return "".join(_LATEX.get(letter, letter) for letter in text)
