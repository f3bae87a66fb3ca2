"""The codec: a spec that exists is valid, JSON data becomes the same spec again, and all else is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import pytest

from vlm_export.errors import InputError
from vlm_export.specs.codec import MAX_INTEGER, Spec, above, below, between, matches, not_empty


@dataclass(frozen=True)
class Circle(Spec):
    radius: Annotated[float, above(0)]
    kind: Literal["circle"] = "circle"


@dataclass(frozen=True)
class Square(Spec):
    side: Annotated[float, above(0)]
    kind: Literal["square"] = "square"


@dataclass(frozen=True)
class Point(Spec):
    x: int
    y: int


@dataclass(frozen=True)
class Span(Spec):
    first: int
    last: int

    def check(self) -> None:
        if self.last < self.first:
            raise self.refusal("last", f"an integer from {self.first}")


@dataclass(frozen=True)
class Drawing(Spec):
    name: Annotated[str, matches(r"[a-z]+", "lower-case letters")]
    count: Annotated[int, between(1, 8)]
    share: Annotated[float, between(0, 1), below(1)]
    visible: bool
    filter: Literal["box", "bicubic"]
    size: tuple[int, int]
    shapes: tuple[Circle | Square, ...]
    place: Point | Span | None
    entries: tuple[int | str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    points: Mapping[str, Point] = field(default_factory=dict)
    names: Annotated[tuple[str, ...], not_empty("at least one name")] = ("one",)
    anything: Any = None
    depth: Annotated[int, between(1)] | None = None
    details: Mapping[str, Any] | None = None


DRAWING = Drawing(
    name="one",
    count=3,
    share=0.5,
    visible=True,
    filter="box",
    size=(3, 4),
    shapes=(Circle(1.5), Square(2.0)),
    place=Span(2, 5),
    entries=(1, "batch", 3),
    labels={"r1": "row"},
    points={"a": Point(1, 2)},
    anything=[{"nested": [1, None]}],
    depth=7,
    details={"a": [1, 2]},
)


def data_of(**changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(DRAWING.to_json()))
    return {**data, **changes}


def refused(**changes: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        Drawing.from_json(data_of(**changes), "file.json")
    assert caught.value.exit_status == 3
    return caught.value


def test_what_was_written_is_read_back() -> None:
    assert Drawing.from_json(data_of(), "file.json") == DRAWING
    bare = replace(DRAWING, place=None, depth=None, details=None, entries=(), labels={}, points={}, shapes=())
    assert Drawing.from_json(json.loads(json.dumps(bare.to_json())), "file.json") == bare


def test_data_is_plain_json_in_the_order_of_the_fields() -> None:
    data = DRAWING.to_json()
    assert list(data)[:3] == ["name", "count", "share"]
    assert data["shapes"] == [{"radius": 1.5, "kind": "circle"}, {"side": 2.0, "kind": "square"}]
    assert data["size"] == [3, 4]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("name", ["One", "", 1, None, ["one"]]),
        ("count", [0, 9, True, 1.0, "3", None]),
        ("share", [1, 1.0, -0.1, True, "0.5", None, float("nan"), float("inf"), 10**400]),
        ("visible", [1, 0, "true", None]),
        ("filter", ["area", None, 1, []]),
        ("size", [[3], [3, 4, 5], [3, True], [3, 4.0], 3, "34", None, {}]),
        ("shapes", [None, {}, "circle"]),
        ("place", [3, "here", []]),
        ("entries", [[1.5], [None], [True], [[1]], 5, {}]),
        ("labels", [{"a": 1}, {"a": None}, [], "a", None]),
        ("points", [[], None]),
        ("names", [[], [1], "one"]),
        ("depth", [0, True, 1.5, "7"]),
        ("details", [[], 3, "a"]),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_the_name_of_its_field(name: str, values: list[Any]) -> None:
    for value in values:
        error = refused(**{name: value})
        assert f"'{name}'" in error.what, value
        assert error.where == "file.json"
        assert error.expected
        assert error.got
        changes: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value}
        with pytest.raises(InputError, match=f"'{name}'"):
            replace(DRAWING, **changes)


@pytest.mark.parametrize(
    ("changes", "where", "what"),
    [
        (
            {"shapes": [{"radius": 1, "kind": "circle"}, {"side": 0, "kind": "square"}]},
            "file.json: shapes[1]",
            "'side'",
        ),
        ({"shapes": [{"side": 1, "kind": "circle"}]}, "file.json: shapes[0]", "unknown field 'side'"),
        ({"shapes": [3]}, "file.json", "'shapes'"),
        ({"points": {"a": {"x": 1, "y": "2"}}}, "file.json: points.a", "'y'"),
        ({"points": {"a": 3}}, "file.json: points.a", "Point is no object"),
        ({"points": {"a": {"x": 1}}}, "file.json: points.a", "missing fields"),
        ({"place": {"first": 5, "last": 2}}, "file.json: place", "'last'"),
    ],
)
def test_the_path_to_a_nested_value_is_told(changes: dict[str, Any], where: str, what: str) -> None:
    error = refused(**changes)
    assert what in error.what
    assert error.where == where


def test_paths_go_on_from_a_place_inside_a_file() -> None:
    with pytest.raises(InputError) as caught:
        Drawing.from_json(data_of(points={"a": 3}), "file.json: drawings[2]")
    assert caught.value.where == "file.json: drawings[2].points.a"


def test_rules_between_fields_hold_for_data_and_for_code() -> None:
    with pytest.raises(InputError, match="'last'") as caught:
        Span(5, 2)
    assert (caught.value.expected, caught.value.got) == ("an integer from 5", "2")
    with pytest.raises(InputError, match="'last'"):
        replace(Span(1, 2), first=3)


def test_unknown_fields_come_with_a_suggestion() -> None:
    error = refused(shape=[])
    assert "unknown field 'shape'" in error.what
    assert error.fix == "did you mean 'shapes'?"


def test_missing_fields_are_listed() -> None:
    data = data_of()
    del data["size"], data["labels"]
    with pytest.raises(InputError, match="missing fields") as caught:
        Drawing.from_json(data, "file.json")
    assert caught.value.got == "no size, labels"
    assert caught.value.expected.startswith("name, count")


def test_fields_that_came_later_may_be_missing() -> None:
    @dataclass(frozen=True)
    class Grown(Spec):
        name: str
        note: str | None = None
        NEWER: ClassVar[frozenset[str]] = frozenset({"note"})

    assert Grown.from_json({"name": "old"}, "file.json") == Grown("old")
    assert Grown("new").to_json() == {"name": "new", "note": None}
    with pytest.raises(InputError, match="missing fields"):
        Grown.from_json({"note": None}, "file.json")


def test_a_config_may_leave_out_what_has_a_default_and_nothing_else() -> None:
    names = ("name", "count", "share", "visible", "filter", "size", "shapes", "place")
    data = {name: value for name, value in data_of().items() if name in names}
    assert Drawing.from_config(data).names == ("one",)
    with pytest.raises(InputError, match="'kind'"):
        Drawing.from_config({**data, "shapes": [{"side": 1}]})
    assert Drawing.from_config({**data, "place": {"x": 1, "y": 2}}).place == Point(1, 2)
    with pytest.raises(InputError, match="missing fields") as caught:
        Drawing.from_config({name: value for name, value in data.items() if name != "size"})
    assert caught.value.got == "no size"


def test_errors_of_a_config_say_what_yaml_made_of_a_value() -> None:
    with pytest.raises(InputError) as caught:
        Drawing.from_config(data_of(share="1e-4"), "configs/x.yaml")
    assert "0.0001" in caught.value.fix
    with pytest.raises(InputError) as caught:
        Drawing.from_config(data_of(name=2.0), "configs/x.yaml")
    assert "quotes" in caught.value.fix


def test_no_object_is_refused() -> None:
    data: Any
    for data in (None, [], 3, "x"):
        with pytest.raises(InputError, match="Drawing is no object"):
            Drawing.from_json(data, "file.json")


def test_errors_say_the_demand_in_words() -> None:
    assert refused(count=9).expected == "an integer from 1 to 8"
    assert refused(share="x").expected == "a finite number from 0 to 1, below 1"
    assert refused(name="A").expected == "a string: lower-case letters"
    assert refused(filter="area").expected == "one of 'box', 'bicubic'"
    assert refused(names=[]).expected.endswith("at least one name")
    assert refused(depth=0).expected == "an integer at least 1 or nothing (null)"


def test_a_long_value_is_cut() -> None:
    assert len(refused(count="x" * 10_000).got) < 300
    assert len(refused(points={"a": "x" * 10_000}).got) < 300


def test_a_whole_number_is_a_float() -> None:
    assert Circle.from_json({"radius": 2, "kind": "circle"}, "x").to_json() == {"radius": 2.0, "kind": "circle"}
    assert isinstance(Circle.from_json({"radius": 2, "kind": "circle"}, "x").radius, float)


def test_integers_beyond_int64_are_refused() -> None:
    assert Point(MAX_INTEGER, -MAX_INTEGER).x == MAX_INTEGER
    for number in (MAX_INTEGER + 1, -MAX_INTEGER - 1):
        with pytest.raises(InputError, match="'x'"):
            Point(number, 0)


def test_the_kind_decides_in_a_union() -> None:
    shapes = [{"kind": "square", "side": 1}, {"kind": "circle", "radius": 1}]
    assert Drawing.from_json(data_of(shapes=shapes), "x").shapes == (Square(1), Circle(1))
    for shape in ({"kind": "triangle", "side": 1}, {"side": 1}, {"kind": ["square"]}):
        error = refused(shapes=[shape])
        assert "'kind'" in error.what
        assert error.expected == "one of 'circle', 'square'"
        assert error.where == "file.json: shapes[0]"


def test_without_a_kind_the_keys_decide() -> None:
    assert Drawing.from_json(data_of(place={"x": 1, "y": 2}), "x").place == Point(1, 2)
    assert Drawing.from_json(data_of(place={"first": 1, "last": 2}), "x").place == Span(1, 2)
    error = refused(place={"first": 1, "y": 2, "last": 2})
    assert error.what == "unknown field 'y'"


@dataclass(frozen=True)
class Wide(Spec):
    x: int
    y: int
    z: int = 0


@dataclass(frozen=True)
class Places(Spec):
    wide_first: Wide | Point
    point_first: Point | Wide


def test_where_the_keys_fit_several_the_one_without_other_fields_is_meant() -> None:
    written = {"x": 1, "y": 2}
    assert Places.from_config({"wide_first": written, "point_first": written}) == Places(Point(1, 2), Point(1, 2))
    full = {**written, "z": 3}
    assert Places.from_config({"wide_first": full, "point_first": full}) == Places(Wide(1, 2, 3), Wide(1, 2, 3))


def test_a_number_of_a_union_keeps_its_type() -> None:
    assert Drawing.from_json(data_of(entries=[1, "1", 0]), "x").entries == (1, "1", 0)


def test_keys_of_objects_are_strings() -> None:
    with pytest.raises(InputError, match="'labels'"):
        Drawing.from_json(data_of(labels={1: "x"}), "x")


def test_an_annotation_that_json_cannot_hold_is_a_mistake_of_the_class() -> None:
    @dataclass(frozen=True)
    class Odd(Spec):
        values: set[int]

    with pytest.raises(TypeError, match="set"):
        Odd({1})
