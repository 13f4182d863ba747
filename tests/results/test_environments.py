"""In what something was measured."""

import subprocess

from memlab import results
from memlab.meters.device import environment as measured_environment


def test_the_environment_is_the_measurements_with_commit_and_date(tmp_path):
    found = results.environment(tmp_path, "cpu")
    assert found.commit is None and found.date > "2026"
    assert found.model_dump(exclude={"commit", "date"}) == measured_environment("cpu")


def test_the_commit_says_when_tracked_files_differ(tmp_path):
    def git(*arguments):
        options = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *options, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert results.commit(tmp_path) is None
    git("init", "-q")
    assert results.commit(tmp_path) is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-q", "-m", "a")
    head = git("rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("1")
    assert results.commit(tmp_path) == head
    (tmp_path / "a").write_text("2")
    assert results.commit(tmp_path) == f"{head}-dirty"

    # The commit of somebody else's repository says nothing.
    (tmp_path / "inner").mkdir()
    assert results.commit(tmp_path / "inner") is None
