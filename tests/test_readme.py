"""What the README says can be run is run; the guides have tests of their own in tests/examples/test_guides.py."""

from pages import FOLDERS, PAGES, README, anchors, blocks, links

TEXT = README.read_text(encoding="utf-8")


def test_it_opens_with_two_commands_of_one_line():
    main_job, tests = blocks(TEXT, "sh")[0].splitlines()
    assert TEXT.index("```sh") < 200
    assert main_job.endswith("&& python examples/quickstart.py")
    assert tests.endswith("&& python -m pytest")


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 220


def test_links_lead_somewhere():
    for page in [*PAGES, *FOLDERS]:
        for path, anchor in links(page.read_text(encoding="utf-8")):
            target = page.parent / path if path else page
            assert target.exists(), (page.name, path)
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), (page.name, path, anchor)
