"""A teacher's answers, computed once, kept on disk, and read by any number of students.

- :mod:`~transfuse.core.store.forms`: what is kept of an answer, and its bytes
- :mod:`~transfuse.core.store.shards`: rows of bytes in files that are checked when they are read
- :mod:`~transfuse.core.store.store`: building a store, and the source that reads it
- :mod:`~transfuse.core.store.views`: answers about augmented images, with seeds in the place of pixels
- :mod:`~transfuse.core.store.imports`: stores of what services and servers wrote down
"""

from transfuse.core.store.forms import Dense, Draws, Form, Layers, TopKept
from transfuse.core.store.imports import import_openai, import_vllm
from transfuse.core.store.store import TeacherStore
from transfuse.core.store.views import ViewStore

__all__ = ["Dense", "Draws", "Form", "Layers", "TeacherStore", "TopKept", "ViewStore", "import_openai", "import_vllm"]
