"""Questions into batches. A batch is what dynamic pruning chooses on, so what goes into one is part of the result.

Shapes: R rows of a batch (one a choice), I <= R inputs that the model is run on, S tokens of the longest of them,
Q questions, K continuation tokens of all rows together.
"""

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from pp_lightning.commonsense.encoding import EncodedQuestion, EncodedRow
from pp_lightning.errors import UserError


class RowBatch(TypedDict):
    """Rows ready to be scored.

    A row's continuation is predicted from its input without the continuation's last token. Rows whose inputs are the
    same (BoolQ's " no" and " yes", where each is one token) therefore share one: it is run once, with the same result.

    Attributes:
        input_ids: (I, S) int64, padded on the right.
        attention_mask: (I, S) int64, 1 at real tokens.
        row_input: input of each row, (R,) int64.
        targets: continuation tokens, row after row, (K,) int64.
        target_row: row of each, (K,) int64.
        target_position: column of the input that predicts it, (K,) int64.
        prefix_of_input: for each input, which of G beginnings it has, (I,) int64.
        prefix_tokens: tokens of each beginning, in front of everything that is scored, (G,) int64; 0 shares nothing.
    """

    input_ids: Tensor
    attention_mask: Tensor
    row_input: Tensor
    targets: Tensor
    target_row: Tensor
    target_position: Tensor
    prefix_of_input: Tensor
    prefix_tokens: Tensor


class ChoiceBatch(RowBatch):
    """Rows that are the choices of whole questions.

    Attributes:
        row_question: question of each row, counted from 0, (R,) int64; rows of a question are neighbours.
        row_characters: characters of the choice, (R,) int64.
        gold: index of the right choice among the question's rows, (Q,) int64.
        cut_rows: rows whose context lost tokens on the left, () int64.
    """

    row_question: Tensor
    row_characters: Tensor
    gold: Tensor
    cut_rows: Tensor


def group_questions(
    questions: Sequence[EncodedQuestion], max_rows: int, *, longest_first: bool
) -> list[list[EncodedQuestion]]:
    """Split questions into batches of at most ``max_rows`` rows: each as full as the next whole question allows.

    ``longest_first`` orders questions by the tokens of their longest row, descending, before they are split; equals
    stay in the order of the data set.
    """
    groups: list[list[EncodedQuestion]] = []
    free = 0
    for question in sorted(questions, key=lambda q: -q.longest) if longest_first else questions:
        rows = len(question.rows)
        if rows > max_rows:
            raise UserError(
                f"{question.question.origin}: {rows} choices do not fit into a batch of {max_rows} rows: "
                "use a larger batch size"
            )
        if rows > free:
            groups.append([])
            free = max_rows
        groups[-1].append(question)
        free -= rows
    return groups


def longest_context_first(questions: Sequence[EncodedQuestion]) -> list[EncodedQuestion]:
    """Questions by the tokens that their rows have in common, descending: answers have no say in the order.

    Those whose rows have nothing in common are spread evenly among the others, so that no batch is left without a
    context that does not depend on the answer.
    """
    common = {id(question): common_tokens(question.rows) for question in questions}
    ordered = sorted((one for one in questions if common[id(one)]), key=lambda one: -common[id(one)])
    others, step = [one for one in questions if not common[id(one)]], len(ordered)
    for number, question in enumerate(others):
        ordered.insert(number + number * step // len(others), question)
    return ordered


def collate_questions(group: Sequence[EncodedQuestion], pad_id: int) -> ChoiceBatch:
    """One batch of these questions."""
    rows = [row for question in group for row in question.rows]
    owners = [index for index, question in enumerate(group) for _ in question.rows]
    characters = [count for question in group for count in question.question.characters]
    return ChoiceBatch(
        **collate_rows(rows, pad_id, owners),
        row_question=torch.tensor(owners),
        row_characters=torch.tensor(characters),
        gold=torch.tensor([question.question.gold for question in group]),
        cut_rows=torch.tensor(sum(row.cut > 0 for row in rows)),
    )


def collate_rows(rows: Sequence[EncodedRow], pad_id: int, owners: Sequence[int] | None = None) -> RowBatch:
    """One batch of these rows.

    ``owners`` has the question of each row, and rows of a question may begin alike; None says nothing about beginnings.
    """
    inputs: dict[tuple[int, ...], int] = {}
    row_input = [inputs.setdefault(row.inputs, len(inputs)) for row in rows]
    ids, mask = _padded(list(inputs), pad_id)
    prefix_of_input, prefix_tokens = _beginnings(rows, row_input, owners or range(len(rows)))
    return RowBatch(
        input_ids=ids,
        attention_mask=mask,
        row_input=torch.tensor(row_input),
        targets=torch.tensor([token for row in rows for token in row.continuation]),
        target_row=torch.tensor([index for index, row in enumerate(rows) for _ in row.continuation]),
        target_position=torch.tensor([position for row in rows for position in _positions(row)]),
        prefix_of_input=torch.tensor(prefix_of_input),
        prefix_tokens=torch.tensor(prefix_tokens),
    )


def _beginnings(
    rows: Sequence[EncodedRow], row_input: Sequence[int], owners: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Which inputs begin alike, and for how many tokens at most: up to the first position that predicts something."""
    first_owner: dict[int, int] = {}
    for index, owner in zip(row_input, owners, strict=True):
        first_owner.setdefault(index, owner)  # inputs that two questions have are run for the first one
    groups = {owner: number for number, owner in enumerate(dict.fromkeys(first_owner.values()))}
    prefix_of_input = [groups[owner] for owner in first_owner.values()]
    members: list[list[EncodedRow]] = [[] for _ in groups]
    for row, index in zip(rows, row_input, strict=True):
        members[prefix_of_input[index]].append(row)
    return prefix_of_input, [common_tokens(group) for group in members]


def common_tokens(rows: Sequence[EncodedRow]) -> int:
    """Tokens that all rows begin with, up to the first position that predicts something in one of them."""
    if len({row.cut for row in rows}) > 1:  # they begin at different places of the context
        return 0
    limit = min(_positions(row).start for row in rows)
    columns = zip(*(row.inputs[:limit] for row in rows), strict=True)
    return next((index for index, column in enumerate(columns) if len(set(column)) > 1), limit)


def _positions(row: EncodedRow) -> range:
    """Columns of the input whose outputs predict the continuation: its last ones."""
    return range(len(row.inputs) - len(row.continuation), len(row.inputs))


def _padded(inputs: Sequence[tuple[int, ...]], pad_id: int) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(tokens) for tokens in inputs])
    ids = torch.full((len(inputs), int(lengths.max())), pad_id)
    for row, tokens in zip(ids, inputs, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()
