"""Write the OpenAPI document of the explorer to standard output: what the page's types are generated from."""

import json

from trimtab.serve.openapi import document
from trimtab.ui.explorer.desk import Desk
from trimtab.ui.explorer.handlers import Explorer, routes_of

found = document(routes_of(Explorer(Desk(paths=True))))
found["info"]["version"] = "0"  # a release changes no type
print(json.dumps(found, indent=1, sort_keys=True))
