"""The example's parts that need no rank: launchers' variables, data, and the record of a run."""

from __future__ import annotations

import importlib
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("example_path")

ENVIRONMENTS = {
    "torchrun": {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
    "Open MPI": {
        "OMPI_COMM_WORLD_RANK": "5",
        "OMPI_COMM_WORLD_SIZE": "8",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    },
    "MPICH": {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"},
    "srun": {
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS_PER_NODE": "4",
    },
}


def load(name: str) -> Any:
    return importlib.import_module(name)


@pytest.mark.parametrize("environment", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_every_launcher_leads_to_one_environment(environment: dict[str, str]) -> None:
    variables = {**environment, "MASTER_ADDR": "first"}
    place = load("launch_env").prepare_environment(variables)
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (5, 8, 1, 4)
    assert {**variables, **ENVIRONMENTS["torchrun"], "MASTER_PORT": "29500"} == variables


def test_srun_that_speaks_pmi_is_srun() -> None:
    """SLURM's own PMI names no local rank; MPICH's launcher inside a job does."""
    environment = {**ENVIRONMENTS["srun"], "PMI_RANK": "5", "PMI_SIZE": "8"}
    place = load("launch_env").place_from(environment)
    assert (place.rank, place.local_rank, place.local_world_size) == (5, 1, 4)
    inside = {**ENVIRONMENTS["MPICH"], "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}
    assert load("launch_env").place_from(inside).rank == 5


def test_srun_without_tasks_per_node() -> None:
    environment = {name: value for name, value in ENVIRONMENTS["srun"].items() if name != "SLURM_NTASKS_PER_NODE"}
    place = load("launch_env").place_from({**environment, "SLURM_NNODES": "2"})
    assert place.local_world_size == 4
    with pytest.raises(ValueError, match="MASTER_ADDR is not set and 8 ranks run on several machines"):
        load("launch_env").prepare_environment({**environment, "SLURM_NNODES": "2"})


def test_no_launcher_means_one_rank_on_this_machine() -> None:
    variables: dict[str, str] = {}
    assert load("launch_env").prepare_environment(variables).world_size == 1
    assert variables["MASTER_ADDR"] == "127.0.0.1"


def test_a_batch_script_is_no_rank() -> None:
    assert load("launch_env").place_from({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}).world_size == 1


def test_several_machines_need_an_address() -> None:
    with pytest.raises(ValueError, match="MASTER_ADDR is not set and 8 ranks run on several machines"):
        load("launch_env").prepare_environment(dict(ENVIRONMENTS["Open MPI"]))


@pytest.mark.parametrize(("value", "message"), [(None, "is not set"), ("four", "is 'four', not a number")])
def test_a_broken_variable_is_named(value: str | None, message: str) -> None:
    variables = {"RANK": "0", "LOCAL_RANK": "0"} | ({} if value is None else {"WORLD_SIZE": value})
    with pytest.raises(ValueError, match=f"WORLD_SIZE {message}"):
        load("launch_env").place_from(variables)


@pytest.mark.parametrize("local_rank", [0, 3])
def test_an_error_that_the_first_rank_did_not_meet_is_told_late(
    local_rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch_env, slept = load("launch_env"), []
    place = launch_env.ProcessPlace(rank=local_rank, world_size=4, local_rank=local_rank, local_world_size=4)
    monkeypatch.setattr(launch_env, "prepare_environment", lambda: place)
    monkeypatch.setattr(launch_env, "time", SimpleNamespace(sleep=slept.append))

    def run(_: Any) -> int:
        raise load("errors").ExampleError("no data on this rank")

    assert launch_env.run_on_this_rank(run, "pretrain") == 2
    assert capsys.readouterr().err == "pretrain: error: no data on this rank\n"
    assert slept == ([launch_env.SECONDS_TO_EXPLAIN + 3] if local_rank > 0 else [])


def test_training_and_validation_bytes_are_all_bytes_once(tmp_path: Path) -> None:
    contents = [bytes(range(100)), bytes(range(100, 200))]
    paths = [tmp_path / name for name in ("first", "second")]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    data = load("data").load_bytes(paths, sequence_length=4)
    assert data.validation.tolist() == [*range(95, 100), *range(195, 200)]
    assert sorted(data.training.tolist() + data.validation.tolist()) == list(range(200))


def test_a_batch_depends_on_its_index_alone(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(bytes(range(250)) * 8)
    data = load("data").load_bytes([tmp_path / "bytes"], sequence_length=16)
    inputs, targets = data.batch("training", 3, (4, 16), 1)
    again, _ = data.batch("training", 3, (4, 16), 1)
    other, _ = data.batch("training", 4, (4, 16), 1)
    assert inputs.shape == targets.shape == (4, 16)
    assert inputs.equal(again)
    assert not inputs.equal(other)
    assert inputs[:, 1:].equal(targets[:, :-1])


def test_standard_library_sources_come_in_one_order() -> None:
    files = load("data").standard_library_files()
    assert len(files) > 100
    assert files == sorted(files)
    assert not [path for path in files if "site-packages" in path.parts]


def test_a_history_is_read_up_to_the_checkpoint(tmp_path: Path) -> None:
    history = load("history")
    names = ",".join(history.StepRecord.__dataclass_fields__)
    path = tmp_path / "metrics.csv"
    path.write_text(f"{names}\n1,5.5,0.1,1,1,1,1,1,1,1\n2,5.0,0.1,1,1,1,1,1,1,1\n", encoding="utf-8")
    assert [record.loss for record in history.read_history(path, last_step=1)] == [5.5]
    assert history.read_history(path, last_step=0) == []
    path.write_text("other,columns\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has other columns"):
        history.read_history(path, last_step=2)


class PowerCut(BaseException):
    """Ends a program at some moment."""


class Moments:
    """Counts the steps of saving, and ends the program at one of them."""

    def __init__(self, last: int) -> None:
        self.left = last

    def through(self, original: Any) -> Any:
        """`original`, as one such step; a plain function, so that it also works as a method."""

        def call(*arguments: Any, **options: Any) -> Any:
            if self.left == 0:
                raise PowerCut
            self.left -= 1
            return original(*arguments, **options)

        return call


def write_draft(folder: Path, step: int) -> None:
    for name in ("rank0.pt", "rank1.pt"):
        path = folder / "unfinished" / f"step{step}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{step}")


def publish_until(last: int, folder: Path) -> bool:
    """Publish step 2 after step 1, ended at moment `last`; whether it was done before that."""
    import checkpoint
    import files

    write_draft(folder, 1)
    checkpoint._publish(folder, "step1")
    write_draft(folder, 2)
    moments = Moments(last)
    with pytest.MonkeyPatch.context() as patches:
        for owner, name in ((files, "_sync"), (Path, "rename"), (Path, "replace"), (shutil, "rmtree")):
            patches.setattr(owner, name, moments.through(getattr(owner, name)))
        try:
            checkpoint._publish(folder, "step2")
        except PowerCut:
            return False
    return True


def test_what_was_saved_last_stays_beside_later_steps_of_an_earlier_run(tmp_path: Path) -> None:
    import checkpoint

    for step in (20, 30, 40, 15, 18, 20):  # from the fourth on, `latest` had been set back
        write_draft(tmp_path, step)
        checkpoint._publish(tmp_path, f"step{step}")
        assert (tmp_path / (tmp_path / "latest").read_text()).is_dir()
    assert checkpoint._saved_steps(tmp_path) == [18, 20, 30, 40]


def test_latest_names_a_whole_checkpoint_at_every_moment(tmp_path: Path) -> None:
    tags = []
    for last in range(100):
        folder = tmp_path / str(last)
        folder.mkdir()
        done = publish_until(last, folder)
        tags.append((folder / "latest").read_text())
        contents = [path.read_text() for path in (folder / tags[-1]).iterdir()]
        assert contents == [tags[-1].removeprefix("step")] * 2
        if done:
            break
    assert len(tags) > 8
    assert tags == sorted(tags)
    assert (tags[0], tags[-1]) == ("step1", "step2")


def test_the_megatron_example_reads_settings(tmp_path: Path) -> None:
    options, errors = load("megatron_options"), load("errors")
    settings = tmp_path / "settings.json"
    settings.write_text('{"comm": "pipe", "chunks": 2}')
    chosen = ["--planmoe-config", str(settings), "--planmoe-chunks", "4", "--planmoe-scheduler", "optimal"]
    assert options.parse_options(chosen, 4).planmoe == {"comm": "pipe", "chunks": 4, "scheduler": "optimal"}
    assert options.parse_options([], 4).planmoe is True
    assert options.parse_options(["--moe-token-dispatcher", "alltoall"], 4).planmoe is False
    for content, words in (("[1]", "holds [1]: settings by name"), ("{", "Expecting property name")):
        settings.write_text(content)
        with pytest.raises(errors.ExampleError, match=re.escape(words)):
            options.parse_options(["--planmoe-config", str(settings)], 4)
    with pytest.raises(errors.ExampleError, match="need --moe-token-dispatcher planmoe"):
        options.parse_options(["--moe-token-dispatcher", "alltoall", "--planmoe-scheduler", "optimal"], 4)


def test_what_is_told_when_no_tokens_travel() -> None:
    describe_sharing = load("report").describe_sharing
    assert describe_sharing(4, 4) == "experts shared by 4"
    assert describe_sharing(1, 1) == "experts shared by 1"
    assert "no tokens travel" in describe_sharing(1, 4)
