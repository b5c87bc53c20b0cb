"""From the results of ``make bench`` to its tables, printed (rich) and written (Markdown)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import log
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

from cases import DTYPES, MAIN, OURS, PLAIN
from rich.table import Table as RichTable

Row = dict[str, Any]
Item = TypeVar("Item")


class Table(NamedTuple):
    """A title, the names of the columns, and cells. Columns of figures stand to the right."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    texts: int = 1
    """columns from the left that are not figures"""

    def markdown(self) -> str:
        align = ["---"] * self.texts + ["---:"] * (len(self.columns) - self.texts)
        lines = [self.columns, align, *self.rows]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

    def with_text(self, text: str) -> str:
        """In Markdown, and what is to be known of it below."""
        return f"{self.markdown()}\n\n{text}"

    def split(self, count: int) -> list[Table]:
        """A table for each beginning of the rows, which is its title, so that it fits a screen."""
        parts = []
        for own, rows in grouped(self.rows, lambda cells: tuple(cells[:count])).items():
            named = zip(self.columns[:count], own, strict=True)
            title = ", ".join(f"{name}: {cell}" for name, cell in named)
            others = [cells[count:] for cells in rows]
            parts.append(Table(title, self.columns[count:], others, self.texts - count))
        return parts

    def rich(self) -> RichTable:
        table = RichTable(title=self.title, title_justify="left")
        for position, name in enumerate(self.columns):
            table.add_column(name, justify="left" if position < self.texts else "right")
        for cells in self.rows:
            table.add_row(*cells)
        return table


def head(row: Row) -> str:
    return f"{row['model']} ({row['D']} × {row['V']})"


def dtype(row: Row) -> str:
    return DTYPES[row["dtype"]]


def of_dtype(rows: Iterable[Row], name: str) -> list[Row]:
    return [row for row in rows if row["dtype"] == name]


def loss_table(rows: Iterable[Row]) -> Table:
    columns = ["dtype", "head", "T", "loss", "implementation", "ms", "± spread", "forward ms"]
    columns += ["passes", "of floor", "peak MiB", "gradient error"]
    return Table(
        "Forward and backward",
        columns,
        [
            [
                dtype(row),
                head(row),
                str(row["T"]),
                row["loss"],
                row["implementation"],
                f"{row['milliseconds']:.4g}",
                f"{row['spread']:.0%}" if row["rounds"] > 1 else "–",
                f"{row['forward_milliseconds']:.4g}",
                f"{row['passes']:.2f}",
                f"{row['ratio']:.2f}",
                f"{row['peak_mib']:.0f}",
                f"{row['gradient_error']:.0e}",
            ]
            for row in measured(rows)
        ],
        texts=5,
    )


def front_rows(rows: Iterable[Row], name: str) -> list[Row]:
    """The losses that training uses in a dtype, at the largest T of the first head at which plain
    PyTorch was measured; none where it was not, or only other lines were run."""
    rows = [row for row in of_dtype(measured(rows), name) if row["loss"] in MAIN]
    rows = [row for row in rows if row["model"] == rows[0]["model"]]
    T = max((row["T"] for row in rows if row["implementation"] == PLAIN), default=None)
    return [row for row in rows if row["T"] == T]


def front_table(rows: Iterable[Row]) -> Table:
    """A row for each loss of one shape: ours, plain PyTorch, and the fastest of all others."""

    def what(row: Row) -> tuple[str, str, str]:
        return dtype(row), str(row["T"]), row["loss"]

    cells = []
    for line, group in grouped(measured(rows), what).items():
        by_name = {row["implementation"]: row for row in group}
        ours, peer = ours_and_fastest_peer(group)
        name = peer["implementation"]
        costs = [cost(row) for row in (ours, by_name[PLAIN], peer)]
        cells.append([*line, *costs[:2], f"{costs[2]} ({name})"])
    columns = ["dtype", "T", "loss", OURS, PLAIN, "the fastest other implementation"]
    return Table("Forward and backward", columns, cells, texts=3)


def cost(row: Row) -> str:
    return f"{row['milliseconds']:.0f} ms, {row['peak_mib']:.0f} MiB"


def ours_and_fastest_peer(rows: Iterable[Row]) -> tuple[Row, Row]:
    """Of the rows of one loss and one shape."""
    rows = measured(rows)
    (ours,) = (row for row in rows if row["implementation"] == OURS)
    others = [row for row in rows if row["implementation"] != OURS]
    return ours, min(others, key=itemgetter("milliseconds"))


def measured(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if "reason" not in row]


def missing(rows: Iterable[Row]) -> list[str]:
    """A line for each reason why an implementation could not run: which ones, what of them."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if "reason" in row:
            names = reasons.setdefault(row["reason"], {})
            losses = names.setdefault(row["implementation"], [])
            if row["loss"] not in losses:
                losses.append(row["loss"])
    lines = []
    for why, names in reasons.items():
        who = [f"{name} ({'; '.join(losses)})" for name, losses in names.items()]
        lines.append(f"{', '.join(who)}: {why}")
    return lines


def rounding_line(rows: Iterable[Row]) -> str:
    """What the errors in bf16 mean, and what a pass in bf16 was there."""
    line = (
        "In bf16 the gradient itself is rounded, which costs up to 4e-03 (2⁻⁸). A larger error is "
        "that of logits or log-probabilities that were rounded too; a wrong formula would have "
        "failed in fp32."
    )
    if any(row["bare_converted"] for row in measured(rows)):
        line += (
            " This CPU has no instructions for bf16 that PyTorch uses: a pass in bf16 converts the "
            "head to fp32, a block at a time, which is faster than PyTorch's product in bf16, a "
            "plain loop that most of the others wait for."
        )
    return line


def verdict(rows: Iterable[Row]) -> list[str]:
    """Where ours is not the fastest or not the smallest; nothing if it is both everywhere."""
    judged = [row for row in measured(rows) if row["loss"] in MAIN]
    found = grouped(judged, lambda row: (dtype(row), head(row), row["T"], row["loss"]))
    lines = []
    for (name, where, T, loss), group in found.items():
        ours = next((row for row in group if row["implementation"] == OURS), None)
        for figure, unit, what in (
            ("milliseconds", "ms", "faster"),
            ("peak_mib", "MiB", "smaller"),
        ):
            for row in group:
                if ours is not None and row[figure] < ours[figure]:
                    lines.append(
                        f"{name}, {where}, T={T}, {loss}: {row['implementation']} is {what}, "
                        f"{row[figure]:.4g} {unit} to our {ours[figure]:.4g}"
                    )
    return lines


def verdict_line(rows: Iterable[Row]) -> str:
    rows = measured(rows)
    lines = verdict(rows)
    if lines:
        return "Not the fastest or not the smallest:\n" + "\n".join(f"- {line}" for line in lines)
    shapes = len({(row["model"], row["T"]) for row in rows})
    return (
        f"For {', '.join(MAIN[:-1])} and {MAIN[-1]} softprompt_fast is the fastest and the "
        f"smallest of those measured, at each of the {shapes} shapes, in "
        f"{' and in '.join(dict.fromkeys(map(dtype, rows)))}."
    )


def exponent(points: list[tuple[float, float]]) -> float:
    """b of y = a x^b, by least squares over the logarithms."""
    return slope([(log(x), log(max(y, 1e-3))) for x, y in points])


def slope(points: list[tuple[float, float]]) -> float:
    x_mean = sum(x for x, _ in points) / len(points)
    y_mean = sum(y for _, y in points) / len(points)
    return sum((x - x_mean) * (y - y_mean) for x, y in points) / sum(
        (x - x_mean) ** 2 for x, _ in points
    )


def growth_table(rows: list[Row]) -> Table:
    lines = []
    of_a_line = itemgetter("axis", "loss", "implementation")
    for (axis, loss, name), group in grouped(rows, of_a_line).items():
        group = sorted(group, key=lambda row: row[axis])
        first, last = group[0], group[-1]
        fixed = (
            f"D={first['D']} V={first['V']}" if axis == "T" else f"T={first['T']} D={first['D']}"
        )
        time = [(row[axis], row["milliseconds"]) for row in group]
        memory = [(row[axis], row["peak_mib"]) for row in group]
        each = [1e3 * row["milliseconds"] / row[axis] for row in group]
        lines.append(
            [
                f"{axis} from {first[axis]} to {last[axis]}, {fixed}",
                loss,
                name,
                f"{exponent(time):.2f}",
                " → ".join(f"{value:.3g}" for value in (each[0], each[-1])),
                f"{exponent(memory):.2f}",
                " → ".join(f"{row['peak_mib']:.0f}" for row in group),
                f"{1e3 * slope(memory):.2f}",
            ]
        )
    columns = ["what grows", "loss", "implementation", "exponent of time", "µs each"]
    columns += ["exponent of memory", "peak MiB", "MiB per 1000"]
    return Table(f"Growth, {dtype(rows[0])}", columns, lines, texts=3)


def grouped(items: Iterable[Item], key: Callable[[Item], tuple]) -> dict[tuple, list[Item]]:
    groups: dict[tuple, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def step_table(rows: list[Row]) -> Table:
    columns = ["model", "the step's KL", "T", "seconds", "peak MiB", "MiB per 1000 tokens"]
    columns += [f"largest T in {rows[0]['budget_mib']} MiB", "peak MiB there"]
    return Table(
        "A whole training step of a model with random weights",
        columns,
        [
            [
                row["model"],
                row["implementation"],
                str(row["T"]),
                f"{row['seconds']:.2f}",
                f"{row['peak_mib']:.0f}",
                f"{1e3 * row['mib_per_token']:.0f}",
                str(row["largest_T"]),
                f"{row['largest_peak_mib']:.0f}",
            ]
            for row in rows
        ],
        texts=2,
    )


def on_screen(table: Table, count: int) -> list[Any]:
    return ["", table.title, *(part.rich() for part in table.split(count))]


def print_losses(rows: list[Row]) -> list[Any]:
    notes = [
        "A pass is one bare product with the head, timed in the same run; of floor: time against "
        "the passes that\nno implementation can avoid. MiB: peak beyond inputs and gradient. "
        "± the distance of the quartiles.",
        rounding_line(rows),
        verdict_line(rows),
    ]
    if lines := missing(rows):
        notes.append("Not measured here:\n" + "\n".join(f"- {line}" for line in lines))
    return [*on_screen(loss_table(rows), 3), *notes]


PRINTED: dict[str, Callable[[list[Row]], list[Any]]] = {
    "losses": print_losses,
    "growth": lambda rows: on_screen(growth_table(rows), 1),
    "training_steps": lambda rows: [step_table(rows).rich()],
}


def other_work(load: float) -> str:
    """load: of the machine, before anything was measured."""
    return f" Other work had the machine at a load of {load:.1f}." if load >= 0.5 else ""
