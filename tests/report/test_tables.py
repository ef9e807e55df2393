from __future__ import annotations

import io

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console, RenderableType

from advisor.report.tables import Column, fitting, list_of, natural_width, table_of


def rendered(part: RenderableType, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    with console.capture() as capture:
        console.print(part)
    return capture.get().splitlines()


def column(header: str, *cells: str, rank: int = 0) -> Column:
    return Column(header=header, cells=cells, rank=rank)


def test_columns_are_left_out_highest_rank_first() -> None:
    columns = [column("a", "1000"), column("b", "2000", rank=2), column("c", "3000", rank=1)]

    kept, dropped = fitting(columns, 10)

    assert [each.header for each in kept] == ["a", "c"]
    assert [each.header for each in dropped] == ["b"]


def test_columns_stay_where_they_have_room() -> None:
    columns = [column("a", "1000"), column("b", "2000", rank=1)]

    assert fitting(columns, natural_width(columns)) == (columns, [])


def test_columns_of_rank_zero_always_stay() -> None:
    columns = [column("a", "1000"), column("b", "2000")]

    assert fitting(columns, 1) == (columns, [])


@given(
    st.lists(st.tuples(st.text("0123456789.", min_size=1, max_size=9), st.integers(0, 5)), min_size=1, max_size=12),
    st.integers(1, 120),
)
def test_columns_that_are_left_in_fit_unless_all_are_of_rank_zero(cells: list[tuple[str, int]], width: int) -> None:
    kept, dropped = fitting([column("h", cell, rank=rank) for cell, rank in cells], width)

    assert len(kept) + len(dropped) == len(cells)
    assert natural_width(kept) <= width or all(each.rank == 0 for each in kept)
    assert min((each.rank for each in dropped), default=5) >= max((each.rank for each in kept), default=0)


def test_a_table_is_as_wide_as_its_columns_say() -> None:
    columns = [column("Step\ns", "2.31", "10.00"), column("Tokens", "56,700", "9")]

    assert max(len(line.rstrip()) for line in rendered(table_of(columns))) == natural_width(columns)


def test_numbers_line_up_on_the_right() -> None:
    lines = rendered(table_of([column("GiB", "51.3", "7.2"), column("s", "2.31", "10.40")]))

    assert {len(line.rstrip()) for line in lines[2:]} == {len("51.3  10.40")}
    assert lines[2].startswith("51.3")
    assert lines[3].startswith(" 7.2")


def test_headers_of_fewer_lines_stand_on_the_rule() -> None:
    lines = rendered(table_of([column("Strategy", "DDP"), column("Peak\nGiB", "51.3")]))

    assert "Peak" in lines[0]
    assert "Strategy" not in lines[0]
    assert "Strategy" in lines[1]
    assert "GiB" in lines[1]
    assert set(lines[2].strip()) == {"─"}


def test_wide_characters_take_two_columns() -> None:
    names = Column(header="Model", cells=["千问-1.5B", "Qwen2.5-1.5B"], justify="left")
    lines = rendered(table_of([names, column("GiB", "2.88", "2.88")]))

    assert len({cell_len(line[: line.index("2.88")]) for line in lines[2:]}) == 1


def test_cells_are_printed_as_they_are() -> None:
    assert "[bold]x[/bold] :smile:" in rendered(table_of([column("h", "[bold]x[/bold] :smile:")]))[2]


def test_the_last_cell_of_a_list_wraps_under_itself() -> None:
    lines = rendered(list_of([("DDP", "one two three"), ("ZeRO-3", "four")]), width=16)

    assert [line.rstrip() for line in lines] == ["DDP     one two", "        three", "ZeRO-3  four"]
