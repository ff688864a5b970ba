from zsnr_diffusers.auditing import simulate


def test_a_bar_counts_the_steps_of_many_numbers_and_none_is_shown_for_few(monkeypatch):
    bars = []

    class Bar:
        def __init__(self, **options):
            self.options, self.n = options, 0
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def update(self, n):
            self.n += n

    monkeypatch.setattr(simulate, "import_extra", lambda name: type("tqdm", (), {"tqdm": Bar}))
    assert [*simulate.with_progress(range(1, 1001))] == [*range(1, 1001)]
    assert [*simulate.with_progress([5, 20])] == [5, 20]
    assert [(bar.n, bar.options["total"], bar.options["disable"]) for bar in bars] == [
        (500500, 500500, None),
        (25, 25, True),
    ]
