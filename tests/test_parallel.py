"""Real processes over gloo, which a fork of this one cannot be: torch has its threads by now."""

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from latent_thoughts.parallel import Ranks, all_or_none, in_turn
from latent_thoughts.types import UserError


def taking_turns(rank: int, local: list[int], folder: Path, together: int, failing: int) -> None:
    """A process of machines with so many each; it leaves what became of it in a file."""
    size = sum(local)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    here = next(count for n, count in enumerate(local) if rank < sum(local[: n + 1]))
    ranks = Ranks(rank, size, here)

    def make() -> list[float]:
        begun = time.time()
        if rank == failing:
            raise UserError("no such model")
        time.sleep(1)
        return [begun, time.time()]

    try:
        told: dict[str, Any] = {"made": in_turn(ranks, make, together)}
    except UserError as error:
        told = {"error": str(error)}
    told["agree"] = [ranks.agree("all the same"), ranks.agree(f"lr {rank}"), ranks.agree("lr 0.5" if rank else "lr 1")]
    told["told"] = [ranks.told(lambda: {"seen by": rank})]
    try:
        ranks.told(lambda: {}["nothing"] if rank else fail("it is damaged"))
    except UserError as error:
        told["told"].append(str(error))
    (folder / f"{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def fail(why: str) -> None:
    raise UserError(why)


def told(folder: Path, local: list[int], together: int = 1, failing: int = -1) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    size = sum(local)
    processes = [context.Process(target=taking_turns, args=(n, local, folder, together, failing)) for n in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return [json.loads((folder / f"{n}.json").read_text()) for n in range(size)]


def test_processes_of_a_machine_take_turns_and_machines_do_not(tmp_path: Path) -> None:
    (a, b, c) = (each["made"] for each in told(tmp_path, [2, 1]))
    assert b[0] >= a[1]  # the first machine's second after its first
    assert c[0] < b[0]  # the other machine's only one with the first


def test_as_many_as_there_is_memory_for_go_together(tmp_path: Path) -> None:
    (a, b, c) = (each["made"] for each in told(tmp_path, [3], together=2))
    assert max(a[0], b[0]) < min(a[1], b[1]) and c[0] >= max(a[1], b[1])


def test_where_one_gives_up_all_do(tmp_path: Path) -> None:
    found = told(tmp_path, [2], failing=1)
    assert [each["error"] for each in found] == ["another of the processes gave up", "no such model"]
    assert [each["agree"] for each in found] == [[True, False, False]] * 2


def test_what_the_main_process_finds_is_told_to_all(tmp_path: Path) -> None:
    """The others do not look, and where it gives up there is nothing to wait for."""
    found = [each["told"] for each in told(tmp_path, [2])]
    assert found == [[{"seen by": 0}, "it is damaged"], [{"seen by": 0}, "another of the processes gave up"]]
    assert Ranks().told(lambda: 3) == 3


def test_alone_there_is_nothing_to_wait_for() -> None:
    assert in_turn(Ranks(), lambda: 3) == 3 and Ranks().most(2) == 2 and Ranks().any(True)
    with all_or_none(Ranks()):
        pass
