"""What a person opens in a browser: the catalog as a page, static or with a live model behind it."""

from saekit.catalog.page.data import PageData as PageData
from saekit.catalog.page.writing import ASSETS as ASSETS
from saekit.catalog.page.writing import INDEX as INDEX
from saekit.catalog.page.writing import assets as assets
from saekit.catalog.page.writing import size_of as size_of
from saekit.catalog.page.writing import write_page as write_page
