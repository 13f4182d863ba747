"""The tables of every comparison."""

from memlab.course import tables
from memlab.units import KiB
from tests.records import GPU, pair, record, results_file, timed, variant

CAPTION = "**CPU, 2 threads** (torch 2.13.0; scale cpu; measured 2026-01-31)"


def test_the_results_table():
    table = tables.results_table(results_file(record(), record(technique="other")))
    assert table.splitlines() == [
        CAPTION,
        "",
        "| notebook | variant | predicted | measured | residual | × less | seconds (spread) |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        "| 03_x | before | 4.00 MiB | 4.00 MiB | +0.00 % | 1.00 | 0.5 (0.012) |",
        "|  | after | 2.02 MiB | 2.00 MiB | -0.99 % | 2.00 | - |",
        "| 03_x: other | before | 4.00 MiB | 4.00 MiB | +0.00 % | 1.00 | 0.5 (0.012) |",
        "|  | after | 2.02 MiB | 2.00 MiB | -0.99 % | 2.00 | - |",
    ]
    assert tables.results_table(results_file()).startswith("**CPU, 2 threads**")


def test_what_stands_in_a_cell_cannot_break_the_table():
    assert tables.markdown([{"a": "x | y\nz"}]).splitlines()[-1] == "| x \\| y z |"
    assert tables.markdown([]) == ""


def test_the_table_of_a_gpu_has_what_it_costs_in_time():
    pieces = record(technique="larger pieces", variants=pair(timed(0.25)))
    sizes = {"batch_size": 2, "sequence_length": 1024}
    budget = record(technique="in 8 GiB", sizes=sizes)
    there = results_file(record(), pieces, budget, environment=GPU)
    assert tables.gpu_table([results_file(pieces), there]).splitlines()[1:] == [
        "",
        "|  | peak | × less | seconds a step | × time |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| before | 4.00 MiB | 1.0 | 0.500 | 1.00 |",
        "| after | 2.00 MiB | 2.0 | 0.250 | 0.50 |",
        "",
        "In a budget of 8 GiB, 2 × 1,024 tokens a step: before: 4.00 MiB; after: 2.00 MiB.",
    ]
    assert tables.gpu_table([results_file(pieces)]) == ""  # a CPU's
    untimed = results_file(record(technique="larger pieces"), environment=GPU)
    assert "| after | 2.00 MiB | 2.0 | - | - |" in tables.gpu_table([untimed])


def test_the_committed_numbers_stand_beside_this_runs():
    def alone(notebook, peak=1000, sizes=None, **more):
        technique = notebook.partition("_")[2]
        kept = [variant(peak=peak, **more)]
        return record(notebook, technique, kept, sizes=sizes or {"layers": 2})

    records = [
        alone("00_a", 2 * KiB, predicted=2000, seconds=timed(0.25)),
        alone("00_a", 4 * KiB),
        alone("01_b"),
        alone("02_c"),
    ]
    committed = results_file(alone("00_a", KiB), alone("01_b", sizes={"layers": 3}))
    lines = tables.run_table(records, committed).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "notebook variant predicted measured residual × less seconds (spread) committed",
        "00_a before 1.95 KiB 2.00 KiB +2.40 % 1.00 0.25 (0.01) 1.00 KiB",
        "00_a before - 4.00 KiB - 1.00 - -",
        "01_b before - 1,000 B - 1.00 - other sizes",
        "02_c before - 1,000 B - 1.00 - -",
    ]
    assert len({len(line) for line in lines}) == 1, "the last column ends at one place"
    assert "committed" in tables.run_table(records)
    assert tables.run_table([]) == "Nothing was recorded."
