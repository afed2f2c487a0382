from deltamoe.engine import Request
from deltamoe.engine.scheduler import Scheduler
from deltamoe.engine.sequence import Job
from tests.engine.harness import TOKENIZER, Recorder


def sequence(order, left=0):
    job = Job(Request(prompt=(0,) * (left + 1)), Recorder(), TOKENIZER, order=order)
    return job.sequences[0]


def orders(sequences):
    return [each.order[0] for each in sequences]


def test_who_came_first_starts_first_and_gives_way_last():
    scheduler = Scheduler()
    for order in (2, 0, 1):
        scheduler.add(sequence(order))
    assert orders(scheduler.waiting) == [0, 1, 2]
    scheduler.start()
    scheduler.start()
    assert orders(scheduler.running) == [0, 1]
    assert scheduler.youngest().order[0] == 1
    scheduler.give_way(scheduler.youngest())
    assert orders(scheduler.running) == [0]
    assert orders(scheduler.waiting) == [1, 2]


def test_one_that_gave_way_comes_before_those_behind_it():
    scheduler = Scheduler()
    for order in range(3):
        scheduler.add(sequence(order))
    first = scheduler.start()
    scheduler.give_way(first)
    assert orders(scheduler.waiting) == [0, 1, 2]


def test_short_prompts_go_first_and_long_ones_are_not_starved():
    scheduler = Scheduler()
    for order, left in enumerate((1000, 10, 20)):
        scheduler.add(sequence(order, left))
        scheduler.start()
    chosen = orders(scheduler.next_prompt() for _ in range(8))
    assert chosen == [1, 1, 1, 0, 1, 1, 1, 0]


def test_of_equals_the_oldest_is_read_to_its_end():
    scheduler = Scheduler()
    for order in range(3):
        scheduler.add(sequence(order, 30))
        scheduler.start()
    for _ in range(3):
        chosen = scheduler.next_prompt()
        assert chosen.order[0] == 0
        chosen.num_read += 10


def test_nobody_has_a_prompt_left():
    scheduler = Scheduler()
    scheduler.add(sequence(0))
    scheduler.start()
    assert scheduler.next_prompt() is None


def test_removing():
    scheduler = Scheduler()
    for order in range(2):
        scheduler.add(sequence(order))
    running = scheduler.start()
    scheduler.remove(running)
    scheduler.remove(scheduler.waiting[0])
    assert not scheduler.has_work
