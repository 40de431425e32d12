"""Print the first rows of a config's data, read from the tensors of their batch, and statistics of all rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from fastpref.config import Config
from fastpref.config.losses import KTO
from fastpref.data.batch import Layout, PreferenceBatch, collate
from fastpref.data.cache import Tokenized, load_examples
from fastpref.data.example import OUTCOMES, Counts, Example
from fastpref.data.forest import Node, places
from fastpref.data.plan import plan_step, wanted_layout
from fastpref.data.tokenize import use_chat_template
from fastpref.errors import UserError
from fastpref.losses.token_loss import scores_prompts
from fastpref.model.adapters.source import with_start
from fastpref.model.limits import Limits, compare, limits_of, pad_token
from fastpref.model.tokenizer import run_tokenizer
from fastpref.preview.numbers import LAYOUTS, PERCENTILES, good_share, lengths, prompt_share, step_tokens
from fastpref.preview.text import Writer

_NAMES = 4  # more rows or completions that share a node are counted instead of named


def preview(
    config: Config, *, rows: int = 4, full: bool = False, cache: bool = True, console: Console | None = None
) -> None:
    """Print the first `rows` rows and the statistics of a config's data. Load the tokenizer, and not the model.

    Long texts are shortened unless `full` is true. Raise UserError for the same mistakes as a run.
    """
    console = console or Console(highlight=False)
    config = with_start(config)
    tokenizer = run_tokenizer(config)
    use_chat_template(tokenizer, config.tokens.chat_template)
    data = load_examples(config, tokenizer, cache=cache)
    limits, unknown = _limits(config)
    beyond = compare(limits, data.parts, tokenizer, config)
    pad, unpadded = pad_token(tokenizer, limits)
    for note in [*data.notes, *beyond, *filter(None, (unknown, unpadded))]:
        console.print(note, markup=False, soft_wrap=True)
    colour = console.color_system is not None and not console.no_color
    writer = Writer(tokenizer, colour=colour, full=full)
    console.print()
    console.print(writer.legend())
    layout = wanted_layout(config)
    plan = plan_step(config.loss, data.train[:rows], layout, config.tokens_per_microbatch)
    step = plan.trained
    for number, (indices, members) in enumerate(zip(step.microbatches, step.groups)):
        batch = collate(
            members,
            layout,
            index=indices,
            pad_token_id=pad,
            score_prompts=scores_prompts(config.loss),
        )
        for example, at, held in zip(members, indices, read(batch)):
            console.print(_row(at, example, held, writer))
        console.print(_microbatch(f"micro-batch {number + 1} of {len(step.microbatches)}", batch, members, layout))
    if isinstance(config.loss, KTO) and (plan.later or plan.first):
        where = "after these prompts" if plan.later else "in a pass before"
        tokens = plan.tokens - sum(step.tokens)
        console.print(f"mismatched completions for the KL, without gradient, {where}: {tokens:,} tokens")
    console.print(_numbers(data, config, layout))


def _limits(config: Config) -> tuple[Limits, str | None]:
    """Return the limits of the model, or why they are unknown: a preview needs only a tokenizer."""
    try:
        return limits_of(config.model), None
    except UserError as error:
        return Limits("the model"), f"rows are not compared with the model's limits: {error}"


# --- The batch -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReadExample:
    """An example as it is in a batch, read from the batch's tensors and not from the example."""

    prompt: list[int]
    completions: list[list[int]]
    scored: list[list[bool]]  # whether each token of the completions is scored
    prompt_scored: bool
    scores: list[float]  # of the completions; [] for pairs and labels
    numbers: dict[str, float]  # the weight and the margin, if the batch has them


def read(batch: PreferenceBatch) -> list[ReadExample]:
    """Return the sequences of a batch, example by example, whatever its layout."""
    ids = batch.input_ids.flatten().tolist()
    scored = set(zip(batch.segments.tolist(), batch.offsets.tolist()))
    prompt_scored = len(batch.lengths) > batch.completions * batch.examples
    examples = []
    for e, prompt in enumerate(batch.prompts):
        sequences = range(e, batch.completions * batch.examples, batch.examples)
        tokens = [[ids[at] for at in places(batch.paths[sequence])] for sequence in sequences]
        completions = [sequence[prompt:] for sequence in tokens]
        uses = [
            [(sequence, at) in scored for at in range(len(completion))]
            for sequence, completion in zip(sequences, completions)
        ]
        scores = [] if batch.scores is None else batch.scores[e].tolist()
        given = {"weight": batch.weights, "margin": batch.margins}
        numbers = {name: float(values[e]) for name, values in given.items() if values is not None}
        examples.append(ReadExample(tokens[0][:prompt], completions, uses, prompt_scored, scores, numbers))
    return examples


# --- Rows ----------------------------------------------------------------------------------------------------------


def _row(at: int, example: Example, held: ReadExample, writer: Writer) -> Group:
    row = example.row
    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=12 if example.scores else 11)
    grid.add_column(overflow="fold")
    text = writer.prompt(held.prompt, scored=held.prompt_scored, cut=row.prompt_cut, turns=row.turns_cut)
    grid.add_row(_labelled("prompt", len(held.prompt)), text)
    scores = held.scores or [None] * len(held.completions)
    for name, ids, scored, cut, score in zip(example.names, held.completions, held.scored, row.completions_cut, scores):
        text = writer.completion(held.prompt, ids, scored, across=row.merged > 0, cut=cut)
        grid.add_row(_labelled(name, len(ids), sum(scored), score), text)
    numbers = [f"{name} {number:g}" for name, number in held.numbers.items()]
    title = ", ".join([f"row {at}: {_short_place(row.place)}", *numbers])
    parts = [Text(), Rule(Text(title), align="left", style="dim"), grid]
    if row.merged:
        tokens = "token of the prompt is" if row.merged == 1 else f"{row.merged} tokens of the prompt are"
        parts.append(Text(f"The last {tokens} part of a completion's first token, and scored with it.", style="yellow"))
    return Group(*parts)


def _labelled(name: str, tokens: int, scored: int | None = None, score: float | None = None) -> Text:
    partly = "" if scored in (None, tokens) else f"\n{scored:,} scored"
    partly += "" if score is None else f"\nscore {score:g}"
    return Text.assemble((name, "bold"), "\n", (f"{tokens:,} token{'s' * (tokens != 1)}{partly}", "dim"))


def _short_place(place: str) -> str:
    """Return a place with the name of its file only, because the config shows the folder."""
    return Path(place).name if "/" in place else place


# --- The micro-batch -----------------------------------------------------------------------------------------------


def _microbatch(which: str, batch: PreferenceBatch, members: Sequence[Example], layout: Layout) -> Group:
    rows, width = batch.input_ids.shape
    title = f"{which}: {layout}, {rows} row{'s' * (rows > 1)} of {width:,} tokens"
    lines = _padded_lines(batch, members) if batch.tree is None else _forest_lines(batch, members)
    costs = {other: collate(members, other).tokens for other in LAYOUTS}
    counted = " · ".join(f"{name} {tokens:,}" for name, tokens in costs.items())
    saved = [f"{1 - costs['tree'] / costs[other]:.0%} of {other}" for other in ("packed", "padded")]
    summary = Text(f"tokens: {counted}; trees save {saved[0]}, {saved[1]}")
    return Group(Text(), Rule(Text(title), align="left", style="dim"), *lines, summary)


def _forest_lines(batch: PreferenceBatch, members: Sequence[Example]) -> list[Text]:
    """Draw the nodes of a packed row, each after the node that its sequences have before it."""
    assert batch.tree is not None
    nodes = batch.tree.nodes
    users: list[list[int]] = [[] for _ in nodes]  # the sequences whose tokens each node holds
    starts = {node.start: at for at, node in enumerate(nodes)}
    for sequence, path in enumerate(batch.paths):
        for run in path:
            place = run.start
            while place < run.stop:  # a run may hold a node and its first child
                users[starts[place]].append(sequence)
                place = nodes[starts[place]].stop
    children: dict[int | None, list[int]] = {}
    for at, node in enumerate(nodes):
        children.setdefault(node.parent, []).append(at)

    texts = []

    def draw(at: int, sign: str, margin: str) -> None:
        parent = nodes[at].parent
        label = _node(nodes[at], users[at], None if parent is None else users[parent], batch, members)
        texts.append(Text(f"at {nodes[at].start:>6,}  {sign}{label}"))
        for child in children.get(at, []):
            last = child == children[at][-1]
            draw(child, margin + ("└─ " if last else "├─ "), margin + ("   " if last else "│  "))

    for root in children.get(None, []):
        draw(root, "", "")
    return texts


def _node(
    node: Node, users: Sequence[int], above: Sequence[int] | None, batch: PreferenceBatch, members: Sequence[Example]
) -> str:
    """Return a node's rows, if they are not those of the node before it, and the parts of them that it holds."""

    def rows_of(sequences: Sequence[int]) -> list[int]:
        return sorted({sequence % batch.examples for sequence in sequences})

    rows = rows_of(users)
    prompt = min(max(min(batch.prompts[e] for e in rows) - node.depth, 0), node.length)
    parts = [f"prompt {prompt:,}"] if prompt else []
    if rest := node.length - prompt:
        names = dict.fromkeys(
            (f"row {batch.index[e]} " if len(rows) > 1 else "") + members[e].names[k]
            for k, e in sorted(divmod(sequence, batch.examples) for sequence in users)
        )
        many = len(names) > _NAMES
        parts.append(f"{f'{len(names)} completions' if many else ', '.join(names)} {rest:,}")
    if above is not None and rows_of(above) == rows:
        return " ── ".join(parts)
    numbers = [str(int(batch.index[e])) for e in rows]
    which = f"{len(rows)} rows" if len(rows) > _NAMES else f"row{'s' * (len(rows) > 1)} {', '.join(numbers)}"
    return f"{which}: {' ── '.join(parts)}"


def _padded_lines(batch: PreferenceBatch, members: Sequence[Example]) -> list[Text]:
    assert batch.attention_mask is not None
    lines = []
    present = [sequence for sequence, path in enumerate(batch.paths) if path]  # lists may have fewer completions
    for sequence, filled in zip(present, batch.attention_mask.sum(1).tolist(), strict=True):
        k, e = divmod(sequence, batch.examples)
        tokens = len(members[e].completions[k])
        padding = batch.input_ids.shape[1] - filled
        parts = f"prompt {filled - tokens:,} ── {members[e].names[k]} {tokens:,} ── padding {padding:,}"
        lines.append(Text(f"row {batch.index[e]}: {parts}"))
    return lines


# --- The numbers ---------------------------------------------------------------------------------------------------


def _numbers(data: Tokenized, config: Config, layout: Layout) -> Group:
    return Group(
        Text(),
        Rule(Text("the data"), align="left", style="dim"),
        _rows_table(data),
        Padding(_lengths_table(data), (1, 0)),
        _steps_table(data, config, layout),
    )


def _table(first: str, *columns: str) -> Table:
    table = Table(first, box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _rows_table(data: Tokenized) -> Table:
    parts = {"training": (data.train, data.counts["train"]), "held-out": (data.heldout, data.counts["heldout"])}
    parts = {name: part for name, part in parts.items() if part[1].rows}
    counts: list[Counts] = [count for _, count in parts.values()]
    table = _table("rows", *parts)

    def add(name: str, *values: str) -> None:
        table.add_row(name, *values)

    add("used", *(f"{count.kept:,}" for count in counts))
    add("dropped", *(f"{count.rows - count.kept:,}" for count in counts))
    for outcome in sorted(OUTCOMES[2:], key=lambda outcome: not outcome.dropped):
        numbers = [getattr(count, outcome.name) for count in counts]
        if any(numbers) or outcome.name in ("prompts_cut", "completions_cut", "merged"):
            add(f"  {outcome.words}" if outcome.dropped else outcome.words, *(f"{number:,}" for number in numbers))
    add("share of prompt tokens", *(f"{prompt_share(examples):.0%}" for examples, _ in parts.values()))
    goods = [good_share(examples) for examples, _ in parts.values()]
    if None not in goods:
        add("good completions", *(f"{good:.0%}" for good in goods))
    nothing = [""] * (len(parts) - 1)
    add("duplicates left out before", f"{data.duplicates:,}", *nothing)
    add("broken rows left out before", f"{data.left_out:,}", *nothing)
    return table


def _lengths_table(data: Tokenized) -> Table:
    table = _table("training tokens", *("max" if percent == 100 else f"p{percent}" for percent in PERCENTILES))
    for part in lengths(data.train):
        table.add_row(part.name, *(f"{tokens:,}" for tokens in part.percentiles))
    return table


def _steps_table(data: Tokenized, config: Config, layout: Layout) -> Table:
    step = step_tokens(data.train, config)
    table = _table(f"a step of {step.rows} {config.loss.unit}s", "tokens", "", "")
    for name, tokens in step.tokens.items():
        ours = "this config's layout" if name == layout else ""
        table.add_row(name, f"{tokens:,.0f}", f"{tokens / step.tokens['tree']:.2f} ×", Text(ours, justify="left"))
    return table
