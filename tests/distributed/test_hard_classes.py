"""The exact top-K of W Wᵀ by blocks over ranks against a full sort."""

import functools

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from instance_ssl.classifier.hard_class_screening import Screen, passing_pairs, passing_pairs_transposed
from instance_ssl.classifier.hard_classes import _Search, find_hard_classes
from instance_ssl.classifier.reference import dense_hard_classes
from instance_ssl.classifier.softmax import normalise_rows
from instance_ssl.distributed.comm import Group
from instance_ssl.distributed.partition import Partition


def sharded_table(
    group: Group, weight_ND: Tensor, k: int, block_bytes: int, screen_dtype: torch.dtype | None = None
) -> Tensor:
    partition = Partition(len(weight_ND), group.size)
    start, stop = partition.bounds(group.rank)
    return find_hard_classes(
        weight_ND[start:stop], k, partition, group, block_bytes=block_bytes, screen_dtype=screen_dtype
    )


def tables_of(group: Group, cases: list[tuple[Tensor, int]], block_bytes: int) -> list[list[Tensor]]:
    """Every case in both precisions, on one set of ranks."""
    return [[sharded_table(group, w, k, block_bytes, t) for t in (torch.bfloat16, torch.float32)] for w, k in cases]


def exact_table(weight_ND: Tensor, k: int) -> Tensor:
    """Brute force over exact cosines: float64 sums of float32 unit rows, rounded to float32."""
    unit_ND = normalise_rows(weight_ND)[0].double()
    cosine_NN = torch.stack([(row * unit_ND).sum(dim=1).float() for row in unit_ND]).fill_diagonal_(-torch.inf)
    return torch.sort(cosine_NN, dim=1, descending=True, stable=True).indices[:, :k].int()


def tied_weights(num_rows: int) -> Tensor:
    """Rows of ±1: norms and cosines are exact in float32, and most cosines are tied."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 2, (num_rows, 16), generator=generator).float() * 2 - 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("block_bytes", [8 * 13 * 13, 8 << 20])
def test_ties_are_settled_by_the_lower_id(world_size: int, block_bytes: int) -> None:
    weight_ND = tied_weights(131)
    expected = dense_hard_classes(weight_ND, 20)
    table = torch.cat(run_ranks(sharded_table, world_size, weight_ND, 20, block_bytes))
    assert table.dtype == torch.int32
    assert torch.equal(table, expected)


@pytest.mark.parametrize("world_size", [1, 3])
def test_table_equals_brute_force_on_random_rows(world_size: int) -> None:
    weight_ND = torch.randn(507, 16, generator=torch.Generator().manual_seed(2))
    table = torch.cat(run_ranks(sharded_table, world_size, weight_ND, 20, 8 * 64 * 64))
    assert torch.equal(table, dense_hard_classes(weight_ND.double(), 20))


@pytest.mark.parametrize("world_size", [1, 3])
def test_duplicates_are_tied_whatever_the_block_s_shape(world_size: int) -> None:
    """Random rows, each twice: a class's twin comes first, and twins of others by their lower id."""
    rows = torch.randn(61, 128, generator=torch.Generator().manual_seed(3))
    weight_ND = torch.cat([rows, rows])
    table = torch.cat(run_ranks(sharded_table, world_size, weight_ND, 9, 8 * 11 * 11))
    for i, hardest in enumerate(table.tolist()):
        assert hardest[0] == (i + 61) % 122
        assert all(b == a + 61 for a, b in zip(hardest[1::2], hardest[2::2], strict=True))


@pytest.mark.parametrize("world_size", [1, 2])
def test_all_other_classes_can_be_asked_for(world_size: int) -> None:
    weight_ND = tied_weights(23)
    table = torch.cat(run_ranks(sharded_table, world_size, weight_ND, 22, 8 * 5 * 5))
    assert torch.equal(table, dense_hard_classes(weight_ND, 22))
    assert all(sorted([*row, i]) == list(range(23)) for i, row in enumerate(table.tolist()))


def adversarial_cases() -> dict[str, tuple[Tensor, int]]:
    """Rows that a screening could fail on, and K."""
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(500, 32, generator=generator)
    centre = torch.randn(1, 32, generator=generator)
    scale = 10.0 ** torch.randint(-6, 7, (500, 1), generator=generator)
    mixed = rows.clone()
    mixed[100:150] = mixed[:1]  # more twins than a table row holds
    mixed[200::50] = 0
    half = torch.full((500, 32), 1 + 2.0**-8)  # halfway between two bfloat16 numbers: the worst rounding
    return {
        "random": (rows, 10),
        "near ties": (centre + 1e-3 * rows, 10),
        "nearer than float32 tells apart": (centre + 1e-7 * rows, 10),
        "worst rounding": (half + 1e-2 * rows, 10),
        "norms from 1e-6 to 1e6": (rows * scale, 10),
        "twins and zero rows": (mixed, 10),
        "all equal": (centre.expand(500, 32).contiguous(), 10),
        "all zero": (torch.zeros(300, 32), 5),
        "opposite": (torch.cat([rows[:300], -rows[:300]]) * centre.sign(), 10),
        "negative cosines only": (torch.eye(40) - 1 / 40, 10),
        "clusters in order": (rows[::50].repeat_interleave(50, dim=0) + 0.3 * rows, 10),
        "nearest come last": (centre + rows * torch.linspace(3, 0.1, 500)[:, None], 10),
        "one hard class": (rows, 1),
        "most classes": (rows[:150], 140),
    }


@functools.cache
def expected_tables() -> dict[str, Tensor]:
    return {name: exact_table(weight_ND, k) for name, (weight_ND, k) in adversarial_cases().items()}


@pytest.mark.parametrize(
    ("world_size", "block_bytes"),
    [
        pytest.param(1, 60_000, marks=pytest.mark.full),
        (1, 8 << 20),
        (2, 60_000),
        (3, 8 << 20),
        pytest.param(4, 60_000, marks=pytest.mark.full),
    ],
)
def test_screening_loses_nothing(world_size: int, block_bytes: int) -> None:
    cases = adversarial_cases()
    results = run_ranks(tables_of, world_size, list(cases.values()), block_bytes)
    for i, (name, expected) in enumerate(expected_tables().items()):
        for tables in zip(*(result[i] for result in results), strict=True):
            assert torch.equal(torch.cat(tables), expected), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_screened_score_errs_by_more_than_its_margin(dtype: torch.dtype) -> None:
    screen = Screen(dtype)
    for weight_ND, _ in adversarial_cases().values():
        unit_ND, _ = normalise_rows(weight_ND)
        errors_N = screen.rounding_errors(unit_ND)
        margins_N = screen.margins(errors_N, errors_N.max(), unit_ND.shape[1])
        exact_NN = unit_ND.double() @ unit_ND.double().T
        low_ND = screen.low_rows(unit_ND, len(unit_ND))
        screened_NN = (low_ND @ low_ND.T).double()
        unit_roundoff = 2.0**-8 if dtype == torch.bfloat16 else 0.0
        assert bool(((screened_NN - exact_NN).abs() <= margins_N[:, None] + screened_NN.abs() * unit_roundoff).all())


def progress_of(group: Group, weight_ND: Tensor, block_bytes: int) -> list[tuple[int, int]]:
    partition = Partition(len(weight_ND), group.size)
    start, stop = partition.bounds(group.rank)
    seen: list[tuple[int, int]] = []
    find_hard_classes(
        weight_ND[start:stop], 3, partition, group, block_bytes=block_bytes, on_block=lambda *at: seen.append(at)
    )
    return seen


@pytest.mark.parametrize("world_size", [1, 4])
def test_progress_counts_every_class_block_once(world_size: int) -> None:
    seen, *others = run_ranks(progress_of, world_size, tied_weights(131), 1)  # one byte: the smallest tiles
    assert all(other == seen for other in others)
    total = len(seen)
    assert seen == [(done, total) for done in range(1, total + 1)]
    assert total == {1: 9, 4: 11}[world_size]  # 131 rows, and 33 + 33 + 33 + 32, in blocks of 16


def odd_tables(group: Group, weight_ND: Tensor, k: int) -> tuple[Tensor, list[int]]:
    partition = Partition(len(weight_ND), group.size)
    start, stop = partition.bounds(group.rank)
    counted: list[int] = []
    table = find_hard_classes(
        weight_ND[start:stop], k, partition, group, block_bytes=60_000, on_not_finite=counted.append
    )
    return table, counted


@pytest.mark.parametrize("world_size", [1, 3])
def test_any_finite_row_has_its_direction_and_others_are_excluded_and_counted(world_size: int) -> None:
    rows = torch.randn(61, 16, generator=torch.Generator().manual_seed(5))
    long_and_short = rows.clone()
    for first, factor in ((0, 2.0**100), (10, 2.0**125), (20, 2.0**-100), (30, 2.0**-120)):
        long_and_short[first : first + 3] *= factor
    long_and_short[1] = torch.finfo(torch.float32).max
    rows[1] = 1
    long_and_short[21] = 1e-44  # without a full mantissa
    rows[21] = 1
    tables = run_ranks(odd_tables, world_size, long_and_short, 20)
    assert torch.equal(torch.cat([table for table, _ in tables]), dense_hard_classes(rows.double(), 20))
    assert all(counted == [] for _, counted in tables)

    for place, value in ((5, torch.nan), (40, torch.inf), (60, -torch.inf)):
        long_and_short[place, 3] = rows[place, 3] = value
    tables = run_ranks(odd_tables, world_size, long_and_short, 20)
    table = torch.cat([table for table, _ in tables])
    assert torch.equal(table, dense_hard_classes(rows.double(), 20))
    assert (table[[5, 40, 60]] == -1).all()
    assert not torch.isin(table, torch.tensor([5, 40, 60], dtype=torch.int32)).any()
    assert all(counted == [3] for _, counted in tables)


def test_without_two_finite_rows_nobody_has_hardest_classes() -> None:
    for num_finite in (0, 1):
        weight_ND = torch.full((7, 4), torch.nan)
        weight_ND[:num_finite] = 1
        ((table, counted),) = run_ranks(odd_tables, 1, weight_ND, 3)
        assert (table == -1).all()
        assert counted == [7 - num_finite]


def crowded(num_rows: int, width: int) -> Tensor:
    """Groups of 12 rows nearer to each other than bfloat16 tells apart, and the groups far from each other."""
    generator = torch.Generator().manual_seed(6)
    centres = torch.randn(num_rows // 12, width, generator=generator).repeat_interleave(12, dim=0)
    return centres + 0.02 * torch.randn(len(centres), width, generator=generator)


@pytest.mark.parametrize("world_size", [1, 2])
def test_margins_are_as_wide_as_the_rounding(world_size: int) -> None:
    """Few pairs pass, so that the screening decides, and it cannot tell which of them are the nearest."""
    weight_ND = crowded(960, 16)[torch.randperm(960, generator=torch.Generator().manual_seed(7))]
    table = torch.cat(run_ranks(sharded_table, world_size, weight_ND, 5, 8 << 20, torch.bfloat16))
    assert torch.equal(table, exact_table(weight_ND, 5))


def test_a_class_all_others_are_opposite_to_is_not_its_own_hardest() -> None:
    """Its bound is no positive score, so all of its pairs pass, with itself among them, where few others' do."""
    weight_ND = crowded(960, 16).abs()
    weight_ND[100] = -1
    (table,) = run_ranks(sharded_table, 1, weight_ND, 5, 8 << 20, torch.bfloat16)
    assert torch.equal(table, exact_table(weight_ND, 5))


def margins_of(group: Group, weight_ND: Tensor) -> Tensor:
    partition = Partition(len(weight_ND), group.size)
    own = weight_ND[slice(*partition.bounds(group.rank))]
    return _Search(own, 5, partition, group, 60_000, torch.bfloat16).margins_n


def test_a_margin_counts_the_rounding_of_other_ranks_rows() -> None:
    """The first rank's unit rows are bfloat16 numbers, which round to themselves; the second's are not."""
    generator = torch.Generator().manual_seed(8)
    exact = torch.randint(0, 2, (30, 16), generator=generator).float() * 2 - 1
    weight_ND = torch.cat([exact, torch.randn(30, 16, generator=generator)])
    screen = Screen(torch.bfloat16)
    errors_N = screen.rounding_errors(normalise_rows(weight_ND)[0])
    assert errors_N[:30].max() == 0
    margins_N = torch.cat(run_ranks(margins_of, 2, weight_ND))
    torch.testing.assert_close(margins_N, screen.margins(errors_N, errors_N.max(), 16))


def test_pairs_pass_alike_by_rows_and_by_columns() -> None:
    bits = torch.randint(0, 1000, (64, 160), dtype=torch.int32, generator=torch.Generator().manual_seed(9))
    cutoffs = bits.sort(dim=1).values[:, -2].contiguous()  # reached exactly, by one score of each row
    pairs, transposed = passing_pairs(bits, cutoffs), passing_pairs_transposed(bits.T.contiguous(), cutoffs)
    assert pairs is not None
    assert transposed is not None
    expected = {(row, column) for row, column in torch.nonzero(bits >= cutoffs[:, None]).tolist()}
    assert set(zip(*(part.tolist() for part in pairs), strict=True)) == expected
    assert set(zip(*(part.tolist() for part in transposed), strict=True)) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bounds_and_cutoffs_keep_their_word_at_every_number(dtype: torch.dtype) -> None:
    """A score that was screened at t is at least the bound of t; the cutoff of an exact e is its margin below e."""
    screen, margins, roundoff = Screen(dtype), torch.tensor([1e-3]), 2.0**-8 if dtype == torch.bfloat16 else 2.0**-22
    exact = torch.linspace(0.01, 1, 501, dtype=torch.float64)
    stored = exact.float().to(dtype)  # a product that was computed exactly
    for score, kept in zip(exact.tolist(), stored[:, None], strict=True):
        bits = kept.view(screen.bits_dtype)
        assert screen.exact_bounds(bits, torch.zeros(1)).item() <= score * (1 + 1e-7)
        assert screen.exact_bounds(bits, margins).item() <= score * (1 + 1e-7) - 1e-3 + 1e-7
        cutoff = screen.cutoff_bits(torch.tensor([score]), margins, 1).view(dtype).item()
        assert cutoff <= (score - 1e-3) * (1 + roundoff)


@pytest.mark.parametrize(
    ("world_size", "not_finite", "k", "num_rows"),
    [
        (3, [0, 5, 60], 57, 61),  # all others, just
        (3, [0, 5, 60], 60, 61),  # more than there are
        (4, [0, 1, 2, 8], 3, 10),  # a rank of which nothing remains
        (2, [*range(8), 9], 3, 10),  # one class remains, and has no other
    ],
)
def test_tables_are_short_where_few_classes_are_finite(
    world_size: int, not_finite: list[int], k: int, num_rows: int
) -> None:
    rows = torch.randn(num_rows, 16, generator=torch.Generator().manual_seed(6))
    finite = torch.tensor([i for i in range(num_rows) if i not in not_finite])
    found = min(k, len(finite) - 1)
    expected = torch.full((num_rows, k), -1, dtype=torch.int32)
    expected[finite, :found] = finite[dense_hard_classes(rows[finite].double(), found).long()].int()
    rows[not_finite, 3] = torch.nan
    tables = run_ranks(odd_tables, world_size, rows, k)
    assert torch.equal(torch.cat([table for table, _ in tables]), expected)
