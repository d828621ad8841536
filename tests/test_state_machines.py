"""The stateful tests as a set: what the ordinary run does of each is enough, and ``make test-slow`` does far more.

The ordinary run repeats the same thousands of steps each time; the long one draws others on every run, and prints how to
repeat a failure.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from tests.cache.test_dual_radix_tree import TreeMachine
from tests.cache.test_kv_cache_machine import KVCacheMachine
from tests.cache.test_merged_keys_machine import MergedKeysMachine
from tests.cache.test_page_pool import PagePoolMachine
from tests.directory.test_index import IndexAgainstNaiveModel
from tests.engine.test_scheduler_machine import EngineMachine

LONG = settings(
    max_examples=1500,
    stateful_step_count=60,
    deadline=None,
    derandomize=False,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
MACHINES = (TreeMachine, PagePoolMachine, MergedKeysMachine, KVCacheMachine, EngineMachine, IndexAgainstNaiveModel)


@pytest.mark.parametrize("machine", MACHINES[:5], ids=lambda machine: machine.__name__)
def test_the_ordinary_run_takes_thousands_of_steps_and_the_same_ones_each_time(machine: type[RuleBasedStateMachine]) -> None:
    profile = machine.TestCase.settings
    assert profile.max_examples * profile.stateful_step_count >= 4500
    assert profile.derandomize


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.__name__)
def test_many_thousands_of_other_steps(machine: type[RuleBasedStateMachine]) -> None:
    run_state_machine_as_test(machine, settings=LONG)
