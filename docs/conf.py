"""The site: pages in Markdown (MyST), API pages from the docstrings. Built by ``make site``."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "_ext"))

project = "softprompt_fast"
author = "The softprompt_fast authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "docstrings"]
exclude_patterns = ["_ext"]

highlight_language = "none"  # of code blocks that name none

html_theme = "furo"
html_title = "softprompt_fast"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#c2410c", "color-brand-content": "#c2410c"},
    "dark_css_variables": {"color-brand-primary": "#fb923c", "color-brand-content": "#fb923c"},
}

# Links to headings (page.md#heading) are checked as GitHub makes them, three levels deep.
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

autodoc_member_order = "bysource"
autoclass_content = "both"
# What transformers and torch say of their own methods belongs to their documentation.
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
add_module_names = False
toc_object_entries_show_parents = "hide"
