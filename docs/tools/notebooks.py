"""Notebooks as pages of the site. EXECUTE=1 runs them first, for their pictures; as they are kept, they have none."""

import base64
import os
import tempfile
import time

import nbformat
from mkdocs.structure.files import File
from nbclient import NotebookClient
from nbconvert import MarkdownExporter


class Notebook(File):
    """A file that is a page, though it is no Markdown."""

    def is_documentation_page(self) -> bool:
        return True


def on_files(files, config):
    """Called by mkdocs with all files."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(file)
        files.append(Notebook(file.src_uri, config.docs_dir, config.site_dir, config.use_directory_urls))
    return files


def on_page_read_source(page, config):
    """Called by mkdocs for the Markdown of each page; None: it reads the file itself."""
    if not isinstance(page.file, Notebook):
        return None
    notebook = nbformat.read(page.file.abs_src_path, as_version=4)
    if os.environ.get("EXECUTE"):
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as empty:
            where = {"metadata": {"path": empty}}
            how = {"timeout": 3600, "kernel_name": "python3", "coalesce_streams": True}
            NotebookClient(notebook, resources=where, **how).execute()
        print(f"{page.file.src_uri}: {time.monotonic() - start:.0f} s")
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    for name, picture in resources["outputs"].items():
        kind = "svg+xml" if name.endswith("svg") else "png"
        text = text.replace(f"({name})", f"(data:image/{kind};base64,{base64.b64encode(picture).decode()})")
    return text
