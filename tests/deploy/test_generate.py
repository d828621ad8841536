from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from forkkv_cluster.core.config import ClusterConfig, load_config


def test_what_is_committed_is_what_the_generator_gives(generator: ModuleType, capsys: pytest.CaptureFixture[str]):
    assert generator.main(["--check"]) == 0, capsys.readouterr().err


def test_a_stale_file_is_named_and_fails_the_check(
    generator: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "deploy").mkdir()
    stale = tmp_path / "deploy" / "cluster.yaml"
    stale.write_text("server: {}\n")
    monkeypatch.setattr(generator, "DEPLOY", tmp_path / "deploy")
    monkeypatch.setattr(generator, "files", lambda: {stale: generator.cluster_yaml()})
    assert generator.main(["--check"]) == 1
    assert "deploy/cluster.yaml is not what" in capsys.readouterr().err
    assert generator.main([]) == 0
    assert generator.main(["--check"]) == 0


def test_the_example_configuration_is_the_default_one_key_for_key(deploy_dir: Path):
    assert load_config(deploy_dir / "cluster.yaml") == ClusterConfig()
    written = yaml.safe_load((deploy_dir / "cluster.yaml").read_text())
    assert written == yaml.safe_load(ClusterConfig().model_dump_json())


def test_every_key_of_the_example_has_its_doc_line(deploy_dir: Path):
    lines = (deploy_dir / "cluster.yaml").read_text().splitlines()
    for above, line in pairwise(lines):
        if line and not line.lstrip().startswith("#"):
            assert above.lstrip().startswith("#"), line
