"""`python -m fedperfix.report DIR...`: the tables and plots of runs, from their folders."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console

from fedperfix.config import ConfigError, Parser, suggestion
from fedperfix.report.layers import PUBLISHED, ROWS, layer_page
from fedperfix.report.plots import plot_against, plot_curves, plot_gains
from fedperfix.report.records import keep_records
from fedperfix.report.runs import ReportedRun, Source, by_row, read_runs
from fedperfix.report.settings import common_text, settings_table, software
from fedperfix.report.statistics import Comparison, compare
from fedperfix.report.tables import (
    Summary,
    Table,
    accuracy_table,
    as_csv,
    comparison_table,
    cost_table,
    domain_table,
)
from fedperfix.run.cli import cli
from fedperfix.run.files import write_text
from fedperfix.run.progress import print_plain

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGE = "README.md"
_PAPER = Path(__file__).parent / "paper.toml"
_MARK = "<!-- made by python -m fedperfix.report; a new report replaces it -->"


@cli
def main(argv: list[str]) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None is the process's own.

    Returns:
        The exit code: 0, or 2 for wrong input (one sentence on stderr).
    """
    arguments = _parser().parse_args(argv)
    out = arguments.out or arguments.folders[0] / "report"
    if arguments.records and len(arguments.folders) > 1:
        raise ConfigError(f"--records: got {len(arguments.folders)} folders, takes one study; leave the others out")
    published = read_published(arguments.published) if arguments.published else {}
    page = report(
        arguments.folders,
        out,
        references=arguments.reference or (),
        published=published,
        title=arguments.title,
        command=shlex.join(["python", "-m", "fedperfix.report", *argv]),
    )
    print_plain(Console(), f"report       {page}")
    if arguments.records:
        records = keep_records(arguments.folders[0], read_runs(arguments.folders)[0], out)
        print_plain(Console(), f"records      {records}")
    return 0


def report(
    folders: Sequence[Path],
    out: Path,
    *,
    references: Sequence[str] = (),
    published: Mapping[str, float] | None = None,
    title: str | None = None,
    command: str = "",
) -> Path:
    """Write the report of runs: a Markdown page, LaTeX and CSV tables, and plots.

    Args:
        folders: runs, or folders of runs.
        out: where to; what an earlier report left there is replaced.
        references: rows that the others are tested against, each against those with as many rounds; plots show the
            first. By default `fedperfix`, or `head` in a study of layer types, else the first row.
        published: somebody else's accuracies by row, to be shown beside; rows that are not there are listed.
        title: of the page; None is the study's own.
        command: to record on the page.

    Returns:
        Path of the page.

    Raises:
        ConfigError: no runs, no such reference, or `out` has a page that is not a report.
    """
    runs, notes, source = read_runs(folders)
    rows = by_row(runs)
    references = [_reference(name, rows) for name in references or (None,)]
    published = published or {}
    page = out / PAGE
    if page.exists() and not page.read_text(encoding="utf-8").startswith(_MARK):
        raise ConfigError(f"--out: '{page}' is not a report of this program; take another folder, or move the file")
    summaries = [Summary.of(row, runs_of, published.get(row)) for row, runs_of in rows.items()]
    tests = {reference: compare(rows, reference) for reference in references}
    missing = {row: value for row, value in published.items() if row not in rows}
    lead = ""
    if rows.keys() <= ROWS.keys():
        lead = layer_page({item.row: item for item in summaries}, read_published(PUBLISHED))
    tables = {"accuracy": accuracy_table(summaries, missing), "costs": cost_table(summaries)}
    domains = domain_table(rows)
    if domains:
        tables["domains"] = domains
    for number, (reference, found) in enumerate(tests.items(), start=1):
        if found:
            tables["tests" if number == 1 else f"tests-{number}"] = comparison_table(reference, found)
    settings = settings_table(rows)
    if settings:
        tables["settings"] = settings
    title = (
        title or source.title or f"{', '.join(rows)} on {', '.join(dict.fromkeys(r.config.dataset for r in runs))}"
    )
    out.mkdir(parents=True, exist_ok=True)
    pictures = _plots(out, rows, references[0])
    for name, table in tables.items():
        write_text(out / f"{name}.tex", table.latex())
    write_text(out / "accuracy.csv", as_csv(summaries, Summary))
    write_text(out / "tests.csv", as_csv([item for found in tests.values() for item in found], Comparison))
    write_text(page, _page(title, rows, tables, pictures, notes, source, command, bool(missing), lead))
    return page


def _reference(name: str | None, rows: Mapping[str, Any]) -> str:
    if name is None:
        return next((row for row in rows if row.split(",")[0] in ("fedperfix", "head")), next(iter(rows)))
    if name not in rows:
        raise ConfigError(f"--reference: got '{name}', takes one of {'; '.join(rows)}" + suggestion(name, rows))
    return name


def _plots(out: Path, rows: Mapping[str, Sequence[ReportedRun]], reference: str) -> dict[str, str]:
    """Draw the plots; their captions by file."""
    captions = {
        "curves.png": "Mean accuracy over all clients after the aggregation; the band is from the lowest to the "
        "highest seed.",
        "bytes.png": "The same against the bytes that were sent until then, up and down.",
        "seconds.png": "The same against the seconds until then, without those of evaluations. Runs side by side, "
        "or on a machine with other work, take longer.",
    }
    plot_curves(out / "curves.png", rows, reference, "Accuracy over rounds")
    plot_against(out / "bytes.png", rows, reference, "Accuracy against bytes", "bytes")
    plot_against(out / "seconds.png", rows, reference, "Accuracy against time", "seconds")
    if plot_gains(out / "gains.png", rows, reference, f"What each client gains by {reference}"):
        captions["gains.png"] = (
            f"Accuracy of each client with {reference} minus that with the other method, in the last evaluation; "
            "the same client, images and seed."
        )
    return captions


def _page(
    title: str,
    rows: Mapping[str, Sequence[ReportedRun]],
    tables: Mapping[str, Table],
    pictures: Mapping[str, str],
    notes: Sequence[str],
    source: Source,
    command: str,
    missing: bool,
    lead: str,
) -> str:
    runs = [run for of_row in rows.values() for run in of_row]
    lines = [
        _MARK,
        "",
        f"# {title}",
        "",
        *([lead] if lead else []),
        _accuracy_text(runs),
        "",
        tables["accuracy"].markdown(),
    ]
    if any(not run.finished for run in runs):
        unfinished = [
            f"{run.folder.name} ({len(run.rounds)} of {run.config.rounds})" for run in runs if not run.finished
        ]
        lines += [f"\\* has unfinished runs, shown with the rounds that they have: {', '.join(unfinished)}.", ""]
    if any(name == "published" for name in tables["accuracy"].columns):
        lines += [_PUBLISHED_TEXT + (" Rows with a dash are not measured here." if missing else ""), ""]
    if notes:
        lines += ["Left out:", "", *(f"- {note}" for note in notes), ""]
    if "domains" in tables:
        lines += ["## By domain", "", _DOMAINS_TEXT, "", tables["domains"].markdown()]
    for name in tables:
        if name.startswith("tests"):
            reference = tables[name].columns[0].removesuffix(" against")
            text = _TESTS_TEXT if name == "tests" else "As above, for the rows with as many rounds."
            lines += [f"## {reference} against the others", "", text, "", tables[name].markdown()]
    lines += ["## Costs", "", _COSTS_TEXT, "", tables["costs"].markdown()]
    for name, caption in pictures.items():
        lines += [f"![{Path(name).stem}]({name})", "", caption, ""]
    lines += ["## How it was made", "", *_provenance(rows, source, command)]
    if "settings" in tables:
        lines += ["", "Settings that a row has by itself:", "", tables["settings"].markdown()]
    return "\n".join(lines) + "\n"


def _accuracy_text(runs: Sequence[ReportedRun]) -> str:
    seeds = ", ".join(str(seed) for seed in sorted({run.config.seed for run in runs}))
    return (
        f"Test accuracy (%) in the last evaluated round over {_tested(runs)}, {_protocol(runs)}: mean over "
        f"clients, then mean over the seeds ({seeds}) ± half the width of the 95 % confidence interval (Student's "
        "t; none for one seed). Bold is the highest among the rows with the most seeds that were tested alike, "
        "after as many rounds. Std is over clients, worst 10 % the mean of their worst tenth, at least one; AUC "
        f"(one class against the rest, {_with_auc(runs)}) and macro-F1 are means over clients. `after local "
        "training` is over the clients that were sampled in that round, before the aggregation. `best` is the "
        "highest of all evaluated rounds; it is chosen on the test images, so it is too high by that choice."
    )


def _tested(runs: Sequence[ReportedRun]) -> str:
    """Which clients the accuracies are of."""
    numbers = sorted({run.last.get("tested_clients") for run in runs}, key=str)
    words = ["all clients" if number is None else f"{number} clients drawn at random" for number in numbers]
    return " or ".join(words)


def _with_auc(runs: Sequence[ReportedRun]) -> str:
    """Of how many clients there is an AUC: one whose test images are all of one class has none."""
    found = sorted({number for run in runs if (number := run.last.get("auc_clients")) is not None})
    span = " to ".join(str(number) for number in dict.fromkeys((found[0], found[-1]))) if found else "only"
    return f"of the {span} clients with test images of several classes"


def _protocol(runs: Sequence[ReportedRun]) -> str:
    """How the accuracies of the table were tested."""
    protocols = {
        "all": "each with the global parameters after the aggregation and its own",
        "mixed": "tested as the authors' released code does (--protocol authors-code)",
    }
    used = dict.fromkeys(run.columns for run in runs)
    if len(used) == 1:
        return protocols[next(iter(used))]
    names = ", ".join(dict.fromkeys(run.row for run in runs if run.columns == "mixed"))
    return f"{protocols['all']}, but {names} {protocols['mixed']}"


_TESTS_TEXT = (
    "Paired are the accuracies of the same client under the same seed, so on the same images, in the last"
    " evaluation, where both runs have the same rounds. Difference is the mean over pairs in points of "
    "accuracy. p is of Wilcoxon's signed-rank test, two-sided, over the pairs, then with Holm's "
    "correction for the number of methods; clients of one seed share a global model, so they are not "
    "independent and this p is too small by that. The t test pairs the means of the seeds, which are "
    "independent, and has few of them."
)
_PUBLISHED_TEXT = "`published` is what the source given with --published reports, with its data, model and seeds."
_DOMAINS_TEXT = "Mean accuracy (%) over the clients of each domain, then over the seeds."
_COSTS_TEXT = (
    "MB per round are up and down together, all sampled clients; GFLOP are of one forward pass of one model, of "
    "which some methods train two. Seconds are of a whole run, with its evaluations, the median over seeds: only "
    "runs that had the machine to themselves can be compared by them."
)


def _provenance(rows: Mapping[str, Sequence[ReportedRun]], source: Source, command: str) -> list[str]:
    runs = [run for of_row in rows.values() for run in of_row]
    entries = [entry for run in runs for entry in run.environments]
    devices = _joined(f"{entry['device']}, {entry.get('processors')} processors" for entry in entries)
    days = sorted({entry["time"][:10] for entry in entries})
    when = " to ".join(dict.fromkeys((days[0], days[-1])))
    first = runs[0]
    images = sum(c.train_images for c in first.clients.values()), sum(c.test_images for c in first.clients.values())
    sizes = [client.train_images + client.test_images for client in first.clients.values()] or [0]
    head, *more = software(rows)
    return [
        f"- {len(runs)} runs, {when}; this page {date.today().isoformat()}.",
        f"- Device: {devices}; {_joined(entry['platform'] for entry in entries)}.",
        f"- Attention and aggregation: {_joined(entry['backend'] for entry in entries)}.",
        f"- {head}",
        *(f"  - {line}" for line in more),
        f"- Data of seed {first.config.seed}: {images[0]:,} images for training, {images[1]:,} for the test, "
        f"{len(first.clients)} clients of {min(sizes):,} to {max(sizes):,} images.",
        f"- Settings, where a row has none of its own: {common_text(rows)}.",
        "",
        "```",
        *source.commands,
        *([command] if command else []),
        "```",
    ]


def _joined(values: Any) -> str:
    return "; ".join(dict.fromkeys(str(value) for value in values if value is not None))


def read_published(text: str) -> dict[str, float]:
    """Published accuracies by row.

    Args:
        text: FILE.toml:TABLE, or paper:TABLE for a table of the paper's.

    Raises:
        ConfigError: no such file or table.
    """
    file, colon, name = text.rpartition(":")
    if not colon:
        raise ConfigError(f"--published: got '{text}', takes FILE.toml:TABLE or paper:TABLE")
    file = str(_PAPER) if file == "paper" else file
    try:
        tables = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            f"--published: cannot read '{file}' ({error}), takes FILE.toml:TABLE or paper:TABLE"
        ) from error
    known = [key for key, value in tables.items() if isinstance(value, dict)]
    if name not in known:
        raise ConfigError(f"--published: '{file}' has no table '{name}', takes one of {', '.join(known)}")
    return {row: _published(row, name, value) for row, value in tables[name].items()}


def _published(row: str, table: str, value: object) -> float:
    """The accuracy of a row: a number, or the first of a list of it and its spread."""
    number = value[0] if isinstance(value, list) and value else value
    if type(number) not in (int, float):
        raise ConfigError(
            f"--published: '{row}' of table '{table}' is {value!r}, takes a number or a list of numbers"
        )
    return float(number)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m fedperfix.report",
        description="Make tables (Markdown, LaTeX, CSV) and plots of runs.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="DIR", help="folders of runs, or of folders of runs")
    add("--out", type=Path, metavar="DIR", help="where to (default: the first DIR, in report/)")
    add(
        "--reference",
        action="append",
        metavar="ROW",
        help="the row that the others are tested against (default: fedperfix); several for rows of unlike rounds",
    )
    add("--published", metavar="FILE:TABLE", help="published accuracies, shown beside; paper:table2-cifar100")
    add("--title", metavar="TEXT", help="of the page (default: the study's)")
    add("--records", action="store_true", help="keep beside the page what it was made from, without checkpoints")
    return parser


if __name__ == "__main__":
    sys.exit(main())
