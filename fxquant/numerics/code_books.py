"""Code books: 16 levels of a weight of 4 bits that are not equally far apart.

A group of weights has many small ones and few large ones, so levels that lie closer to each other
near zero keep more of it than 16 integers do. Levels are whole numbers of 8 bits, counted from 128,
and a code of 4 bits is the number of one:

    x ≈ scale · (level[code] − 128)

So a code book is an `IntegerType` of which there are 16 integers only. Everything that rounds to
the integers of a type, or multiplies with them, is the same with a book; where codes lie packed,
they are looked up. A file names the book of a weight, and holds nothing else for it.
"""

from fxquant.errors import OptionError, check_choice
from fxquant.numerics.integers import IntegerType, unsigned

CODE_BITS = 4
_MIDDLE = 128


def _book(name: str, *levels: int) -> IntegerType:
    """A book of levels around zero, rising."""
    book = tuple(level + _MIDDLE for level in levels)
    return IntegerType(name, CODE_BITS, book[0], book[-1], book)


# "nf4" has the values of Dettmers et al., "QLoRA", arXiv:2305.14314, times 127: of normally
# distributed weights each level gets about as many.
CODE_BOOKS = {
    book.name: book
    for book in (
        _book("nf4", -127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127),
    )
}
_NAMES = (None, *CODE_BOOKS)  # a kernel knows a book by its place here: see csrc/code_books.h


def integer_type(bits: int, code_book: str | None = None) -> IntegerType:
    """The integers of a weight.

    Args:
        bits: of a code.
        code_book: a name of `CODE_BOOKS`; None: the integers 0 .. 2 ** bits - 1 themselves.

    Raises:
        OptionError: there is no such width, or no such book of that width.
    """
    integer = unsigned(bits)
    if code_book is None:
        return integer
    check_code_book(code_book)
    if bits != CODE_BITS:
        raise OptionError(
            "bits",
            found=f"{bits} with the code book {code_book!r}",
            needed=f"{CODE_BITS}: its {len(CODE_BOOKS[code_book].book or ())} levels",
            remedy=f"Pass bits={CODE_BITS}, or leave code_book out.",
        )
    return CODE_BOOKS[code_book]


def check_code_book(code_book: str | None) -> None:
    """Raise an `OptionError` unless it is None or a name of `CODE_BOOKS`."""
    if code_book is not None:
        check_choice("code_book", code_book, CODE_BOOKS)


def number_of(code_book: str | None) -> int:
    """The number by which kernels know a book; 0 for none."""
    return _NAMES.index(code_book)


def code_book_of(number: int) -> str | None:
    """Undo `number_of`."""
    return _NAMES[number]
