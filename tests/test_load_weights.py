"""Weights of a stage come from a checkpoint by FQN: the right ones, no others, or an error that names them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import buffer_lifting as bl
from buffer_lifting.package import checkpoints

BATCH, SEQ = 2, 12


def config(tied: bool = False) -> Any:
    return transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
        tie_word_embeddings=tied,
    )


class Case:
    """A Hugging Face model: its checkpoints, and its stages, exported on the meta device and saved without weights."""

    def __init__(self, path: Path, tied: bool) -> None:
        self.path = path
        torch.manual_seed(0)
        self.model = transformers.LlamaForCausalLM(config(tied)).eval()
        self.model.save_pretrained(path / "one")
        self.model.save_pretrained(path / "sharded", max_shard_size="30KB")
        state = self.model.state_dict()
        dcp.save(dict(state), checkpoint_id=path / "dcp", no_dist=True)
        dcp.save({"model": dict(state), "step": 3}, checkpoint_id=path / "nested", no_dist=True)
        with torch.device("meta"):
            empty = transformers.LlamaForCausalLM(config(tied)).eval()
            sizes = {"input_ids": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
            tokens = torch.zeros(4, 16, dtype=torch.long)
            program = torch.export.export(empty, (), {"input_ids": tokens}, dynamic_shapes=sizes)
        staged = bl.partition(bl.lift(program), num_stages=2)
        staged.bind_tables(self.model)
        staged.save(path / "stages", weights=False)

    def stage(self, index: int) -> Any:
        return bl.load_stage(self.path / "stages", index)

    def check(self, stages: list[Any]) -> None:
        """The stages give the eager model's logits, bitwise, and have its parameters."""
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(0, 64, (BATCH, SEQ), generator=generator)
        values: list[Tensor] = []
        for stage in stages:
            feed = stage.feed(BATCH, SEQ)
            result = stage.stage.module(*values, input_ids=tokens, **feed)
            values = [result]
            for fqn, value in stage.stage.module.state_dict().items():
                assert torch.equal(value, self.model.state_dict()[fqn]) and value.device.type == "cpu"
        assert torch.equal(values[0], self.model(tokens).logits)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("llama"), tied=False)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("tied"), tied=True)


SOURCES: dict[str, tuple[Callable[[Case], Any], dict[str, Any]]] = {
    "safetensors": (lambda case: case.path / "one", {}),
    "safetensors file": (lambda case: case.path / "one" / "model.safetensors", {}),
    "sharded": (lambda case: str(case.path / "sharded"), {}),
    "sharded index": (lambda case: case.path / "sharded" / "model.safetensors.index.json", {}),
    "dcp": (lambda case: case.path / "dcp", {}),
    "nested dcp": (lambda case: case.path / "nested", {"prefix": "model."}),
    "mapping": (lambda case: case.model.state_dict(), {}),
}


@pytest.mark.parametrize("which", ("case", "tied"))
@pytest.mark.parametrize("source", SOURCES)
def test_round_trip(source: str, which: str, request: pytest.FixtureRequest) -> None:
    """A model on disk, exported on meta, lifted, split, saved without weights, loaded, and given its weights."""
    case = request.getfixturevalue(which)
    find, options = SOURCES[source]
    stages = [case.stage(index) for index in range(2)]
    for stage in stages:
        assert all(value.device.type == "meta" for value in stage.stage.module.parameters())
        stage.load_weights(find(case), **options)
        assert all(value.requires_grad and value.is_leaf for value in stage.stage.module.parameters())
    case.check(stages)


def test_parameters_of_a_mapping_are_copies(case: Case) -> None:
    state = {fqn: value.clone() for fqn, value in case.model.state_dict().items()}
    stage = case.stage(0)
    stage.load_weights(state)
    for value in state.values():
        value.zero_()
    assert all(value.any() for value in stage.stage.module.parameters())


def test_a_file_that_changes_later_changes_no_weights(case: Case, tmp_path: Path) -> None:
    """safetensors maps the file into memory."""
    shutil.copytree(case.path / "one", tmp_path / "one")
    stages = [case.stage(index) for index in range(2)]
    for stage in stages:
        stage.load_weights(tmp_path / "one")
    file = tmp_path / "one" / "model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 4)
        stream.write(bytes(file.stat().st_size // 2))
    case.check(stages)


def test_weights_can_be_loaded_again_in_place(case: Case, tmp_path: Path) -> None:
    """An optimizer that was made in between still has the stage's parameters."""
    stage = case.stage(1)
    stage.load_weights({fqn: torch.zeros_like(value) for fqn, value in case.model.state_dict().items()})
    before = dict(stage.stage.module.named_parameters())
    stage.load_weights(case.path / "sharded")
    after = dict(stage.stage.module.named_parameters())
    assert all(after[fqn] is value and value.any() for fqn, value in before.items())


def test_torch_itself_loads_a_stage(case: Case) -> None:
    """FQNs are the model's: dcp.load takes the stage's own state dict."""
    stage = case.stage(1).stage.module.to_empty(device="cpu")
    dcp.load(stage.state_dict(), checkpoint_id=case.path / "dcp", no_dist=True)
    assert all(torch.equal(value, case.model.state_dict()[fqn]) for fqn, value in stage.state_dict().items())


# Only what the stage has --------------------------------------------------------------------------------


def test_a_stage_opens_its_own_shards_only(case: Case, tmp_path: Path) -> None:
    shutil.copytree(case.path / "sharded", tmp_path / "sharded")
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_bytes())["weight_map"]
    stages = [case.stage(number) for number in range(2)]
    own = [{index[fqn] for fqn in stage.stage.module.state_dict()} for stage in stages]
    assert own[0] - own[1] and own[1] - own[0]
    for file in own[0] - own[1]:
        (tmp_path / "sharded" / file).unlink()
    stages[1].load_weights(tmp_path / "sharded")
    with pytest.raises(bl.LiftingError, match=r"model-.* cannot be read"):
        stages[0].load_weights(tmp_path / "sharded")
    assert all(value.device.type == "meta" for value in stages[0].stage.module.parameters())


@pytest.mark.parametrize("kind", ("sharded", "dcp"))
def test_only_its_own_tensors_are_read(case: Case, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for source in (checkpoints._SafetensorsSource, checkpoints._DistributedSource):
        read = source.read

        def note(self: Any, names: Any, device: Any, read: Any = read) -> Any:
            names = list(names)
            asked.extend(names)
            return read(self, names, device)

        monkeypatch.setattr(source, "read", note)
    stage = case.stage(1)
    stage.load_weights(case.path / kind)
    assert sorted(asked) == sorted(stage.stage.module.state_dict())


def test_a_distributed_checkpoint_is_read_in_part(case: Case, tmp_path: Path) -> None:
    big = torch.zeros(4, 1 << 20)
    dcp.save({**case.model.state_dict(), "of.another": big}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    stage = case.stage(1)
    before = bytes_read()
    stage.load_weights(tmp_path / "dcp", strict=False)
    assert bytes_read() - before < big.nbytes / 4


def bytes_read() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


# What does not fit ---------------------------------------------------------------------------------------

FIRST = "model.layers.0.mlp.up_proj.weight"
Change = Callable[[dict[str, Tensor]], None]


def put(fqn: str, value: Any) -> Change:
    return lambda state: state.update({fqn: value})


CHANGES: dict[str, tuple[Change, str]] = {
    "missing": (lambda state: state.pop(FIRST) is None or None, f"has no '{FIRST}'"),
    "unexpected": (put("model.layers.9.extra", torch.ones(2)), "'model.layers.9.extra'.*does not have; strict=False"),
    "shape": (put(FIRST, torch.ones(64, 31)), rf"{FIRST} has shape \(64, 31\), the program has \(64, 32\)"),
    "dtype": (put(FIRST, torch.ones(64, 32).bfloat16()), f"{FIRST} is bfloat16, the program has float32; cast=True"),
    "integers": (put(FIRST, torch.ones(64, 32, dtype=torch.int32)), f"{FIRST} is int32"),
}


@pytest.mark.parametrize("kind", ("mapping", "safetensors", "dcp"))
@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_fit_is_named(case: Case, change: str, kind: str, tmp_path: Path) -> None:
    state = {fqn: value.clone() for fqn, value in case.model.state_dict().items()}
    edit, match = CHANGES[change]
    edit(state)
    source: Any = state
    if kind == "safetensors":
        source = tmp_path / "model.safetensors"
        save_file(state, source)
    elif kind == "dcp":
        source = tmp_path / "dcp"
        dcp.save(state, checkpoint_id=source, no_dist=True)
    stage = case.stage(0)
    with pytest.raises(bl.LiftingError, match=match):
        stage.load_weights(source)
    assert all(value.device.type == "meta" for value in stage.stage.module.parameters())  # nothing is half loaded


def test_strict_and_cast(case: Case) -> None:
    state = {fqn: value.bfloat16() for fqn, value in case.model.state_dict().items()}
    stage = case.stage(0)
    stage.load_weights({**state, "extra": torch.ones(1)}, strict=False, cast=True)
    for fqn, value in stage.stage.module.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, state[fqn].float())
    state[FIRST] = torch.ones(64, 32, dtype=torch.int64)
    with pytest.raises(bl.LiftingError, match="is int64"):
        stage.load_weights(state, cast=True)


@pytest.mark.parametrize(
    ("given", "options", "match"),
    (
        (lambda s: {f"module.{k}": v for k, v in s.items()}, {"strict": False}, r"is prefix='module\.' missing"),
        (lambda s: {k.removeprefix("model."): v for k, v in s.items()}, {"strict": False}, "of an inner module"),
        (lambda s: s, {"prefix": "other."}, r"behind the prefix 'other\.'"),
        (lambda s: dict.fromkeys(s, 3), {}, "is a int in the mapping"),
        (lambda s: {k: v.to("meta") for k, v in s.items()}, {}, "has no values"),
    ),
    ids=("prefix left out", "inner module", "no such prefix", "numbers", "meta"),
)
def test_mappings_that_do_not_fit(case: Case, given: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(bl.LiftingError, match=match):
        case.stage(0).load_weights(given(case.model.state_dict()), **options)


def test_checkpoints_that_cannot_be_read(case: Case, tmp_path: Path) -> None:
    stage = case.stage(0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    (tmp_path / "cut.safetensors").write_bytes((case.path / "one" / "model.safetensors").read_bytes()[:100])
    shutil.copytree(case.path / "dcp", tmp_path / "dcp")
    (tmp_path / "dcp" / ".metadata").write_bytes(b"none")
    for name, weights in (("lacking", {FIRST: "no.safetensors"}), ("outside", {FIRST: "../one/model.safetensors"})):
        (tmp_path / name).mkdir()
        whole = {fqn: next(iter(weights.values())) for fqn in case.model.state_dict()}
        (tmp_path / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": whole}))
    for name, match in (
        ("nothing", "there is no checkpoint"),
        ("empty", "no checkpoint that can be read"),
        ("pytorch_model.bin", "give a mapping"),
        ("cut.safetensors", "cannot be read"),
        ("dcp", "cannot be read"),
        ("lacking", r"no\.safetensors cannot be read"),
        ("outside", "which is not beside it"),
    ):
        with pytest.raises(bl.LiftingError, match=match):
            stage.load_weights(tmp_path / name)


# Tied weights and tables ---------------------------------------------------------------------------------


def test_tied_weights_are_found_under_either_name(tied: Case) -> None:
    """safetensors keeps one name; both stages find it."""
    names = load_file(tied.path / "one" / "model.safetensors").keys()
    assert ("lm_head.weight" in names) != ("model.embed_tokens.weight" in names)
    state = tied.model.state_dict()
    for left_out in ("lm_head.weight", "model.embed_tokens.weight"):
        stages = [tied.stage(index) for index in range(2)]
        for stage in stages:
            stage.load_weights({fqn: value for fqn, value in state.items() if fqn != left_out})
        tied.check(stages)


def test_an_untied_checkpoint_is_refused(tied: Case) -> None:
    state = {**tied.model.state_dict(), "lm_head.weight": torch.ones(64, 32)}
    with pytest.raises(bl.LiftingError, match=r"'lm_head\.weight'.*are one parameter in the program"):
        tied.stage(0).load_weights(state)


class Tables(torch.nn.Module):
    """A table that is in no checkpoint and stays in the stages, one that is in it, and tied weights in one stage."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(16, 8)
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.rand(8) + 1)
        self.register_buffer("table", torch.rand(32, 8), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) * self.scale + self.table[: tokens.shape[1]]
        return self.second(self.first(x).relu())  # type: ignore[no-any-return]


def test_tables_and_buffers(tmp_path: Path) -> None:
    model = Tables()
    sizes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    tokens = torch.randint(0, 16, (2, 5))
    program = torch.export.export(model, (tokens,), dynamic_shapes=sizes)
    staged = bl.partition(bl.lift(program, form="positions"), num_stages=1)
    staged.save(tmp_path / "stages", weights=False)
    stage = bl.load_stage(tmp_path / "stages", 0)
    module = stage.stage.module
    assert torch.equal(module.get_buffer("table"), model.table)  # saved: it is in no checkpoint
    assert module.get_buffer("scale").device.type == "meta"
    assert "table" not in module.state_dict() and "scale" in module.state_dict()
    (name,) = {"first.weight", "second.weight"} & {fqn for fqn, _ in module.named_parameters()}  # export reads one
    stage.load_weights({fqn: value for fqn, value in model.state_dict().items() if fqn != name})
    assert torch.equal(module.get_buffer("scale"), model.scale)
    assert torch.equal(module(tokens, **stage.feed(2, 5)), model(tokens))
    with pytest.raises(bl.LiftingError, match=r"'table'.*does not have"):
        stage.load_weights({**model.state_dict(), "table": model.table})
    with pytest.raises(bl.LiftingError, match="'scale'"):
        stage.load_weights({fqn: value for fqn, value in model.state_dict().items() if fqn != "scale"})


@pytest.mark.slow
def test_a_lifted_program_without_weights(tied: Case, tmp_path: Path) -> None:
    """Saved small, split somewhere else for another number of stages, and given its weights there."""
    tokens = torch.zeros(4, 16, dtype=torch.long)
    sizes = {"input_ids": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    program = torch.export.export(tied.model, (), {"input_ids": tokens}, dynamic_shapes=sizes)
    lifted = bl.lift(program)
    lifted.save(tmp_path / "with")
    lifted.save(tmp_path / "without", weights=False)
    data = (tmp_path / "without").read_bytes()
    for fqn, value in tied.model.named_parameters():
        part = value.detach().flatten()[:16].numpy().tobytes()
        assert part in (tmp_path / "with").read_bytes()
        assert part not in data or len(set(part)) < 9, fqn
    again = bl.load(tmp_path / "without")
    assert lifted.program.state_dict and all(v.device.type == "cpu" for v in lifted.program.state_dict.values())
    assert {fqn: (value.shape, value.dtype, value.device.type) for fqn, value in again.program.state_dict.items()} == {
        fqn: (value.shape, value.dtype, "meta") for fqn, value in lifted.program.state_dict.items()
    }
    bl.partition(again, num_stages=3).save(tmp_path / "stages", weights=False)
    stages = [bl.load_stage(tmp_path / "stages", index) for index in range(3)]
    for stage in stages:
        stage.load_weights(tied.path / "one")
    tied.check(stages)
