"""The problems of core_code: each function with its docstring is a prompt, its body a solution, the asserts its tests.

A test is `assert name(arguments) == value` or `is value`, with literals: it is read as data, and floats may differ by
1e-9. Importing this module runs every solution against its tests.
"""

from __future__ import annotations

from typing import Any


def add_three(a: int, b: int, c: int) -> int:
    """Return the sum of the three numbers a, b and c."""
    return a + b + c


assert add_three(1, 2, 3) == 6
assert add_three(-5, 5, 0) == 0


def square(x: int) -> int:
    """Return x multiplied by itself."""
    return x * x


assert square(7) == 49
assert square(-3) == 9


def is_even(n: int) -> bool:
    """Return True if n is even, and False otherwise."""
    return n % 2 == 0


assert is_even(4) is True
assert is_even(7) is False


def larger(a: int, b: int) -> int:
    """Return the larger of a and b."""
    return max(a, b)


assert larger(3, 9) == 9
assert larger(4, -4) == 4


def first_and_last(items: list[int]) -> list[int]:
    """Return a list of the first and the last item of a list that is not empty.

    >>> first_and_last([5, 6, 7])
    [5, 7]
    """
    return [items[0], items[-1]]


assert first_and_last([5, 6, 7]) == [5, 7]
assert first_and_last([2]) == [2, 2]


def count_vowels(text: str) -> int:
    """Return how many letters of text are one of a, e, i, o, u, in lower or upper case.

    >>> count_vowels("Apple")
    2
    """
    return sum(letter in "aeiou" for letter in text.lower())


assert count_vowels("Apple") == 2
assert count_vowels("rhythm") == 0
assert count_vowels("AEIOU") == 5


def reverse_text(text: str) -> str:
    """Return text backwards.

    >>> reverse_text("abc")
    'cba'
    """
    return text[::-1]


assert reverse_text("abc") == "cba"
assert reverse_text("") == ""


def is_palindrome(text: str) -> bool:
    """Return True if text reads the same backwards.

    >>> is_palindrome("level")
    True
    """
    return text == text[::-1]


assert is_palindrome("level") is True
assert is_palindrome("ab") is False


def sum_of_list(numbers: list[int]) -> int:
    """Return the sum of all numbers in the list.

    >>> sum_of_list([1, 2, 3])
    6
    """
    return sum(numbers)


assert sum_of_list([1, 2, 3]) == 6
assert sum_of_list([]) == 0


def mean(numbers: list[float]) -> float:
    """Return the arithmetic mean of a list of numbers that is not empty.

    >>> mean([1.0, 2.0, 3.0])
    2.0
    """
    return sum(numbers) / len(numbers)


assert mean([1.0, 2.0, 3.0]) == 2.0
assert mean([5.0]) == 5.0


def factorial(n: int) -> int:
    """Return the factorial of n, the product of the numbers from 1 to n.

    >>> factorial(4)
    24
    """
    result = 1
    for number in range(2, n + 1):
        result *= number
    return result


assert factorial(4) == 24
assert factorial(0) == 1
assert factorial(10) == 3628800


def fibonacci(n: int) -> int:
    """Return the n-th Fibonacci number, where fibonacci(0) is 0 and fibonacci(1) is 1."""
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a


assert fibonacci(0) == 0
assert fibonacci(1) == 1
assert fibonacci(10) == 55


def only_positive(numbers: list[int]) -> list[int]:
    """Return the numbers of the list that are greater than zero, in their order.

    >>> only_positive([1, -2, 0, 3])
    [1, 3]
    """
    return [number for number in numbers if number > 0]


assert only_positive([1, -2, 0, 3]) == [1, 3]
assert only_positive([-1]) == []


def double_all(numbers: list[int]) -> list[int]:
    """Return a list with every number multiplied by two.

    >>> double_all([1, 2])
    [2, 4]
    """
    return [2 * number for number in numbers]


assert double_all([1, 2]) == [2, 4]
assert double_all([]) == []


def without_duplicates(items: list[int]) -> list[int]:
    """Return the items without repetitions, each at the place where it comes first.

    >>> without_duplicates([3, 1, 3, 2, 1])
    [3, 1, 2]
    """
    return list(dict.fromkeys(items))


assert without_duplicates([3, 1, 3, 2, 1]) == [3, 1, 2]
assert without_duplicates([]) == []


def count_words(text: str) -> int:
    """Return the number of words in text; words are separated by spaces.

    >>> count_words("the quick  fox")
    3
    """
    return len(text.split())


assert count_words("the quick  fox") == 3
assert count_words("") == 0


def longest_word(words: list[str]) -> str:
    """Return the longest of the words; of equally long ones, the first.

    >>> longest_word(["a", "bcd", "ef"])
    'bcd'
    """
    return max(words, key=len)


assert longest_word(["a", "bcd", "ef"]) == "bcd"
assert longest_word(["one", "two"]) == "one"


def celsius_to_fahrenheit(celsius: float) -> float:
    """Convert a temperature from degrees Celsius to degrees Fahrenheit.

    >>> celsius_to_fahrenheit(100.0)
    212.0
    """
    return celsius * 9 / 5 + 32


assert celsius_to_fahrenheit(100.0) == 212.0
assert celsius_to_fahrenheit(-40.0) == -40.0


def is_leap_year(year: int) -> bool:
    """Return True if year is a leap year of the Gregorian calendar."""
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)


assert is_leap_year(2024) is True
assert is_leap_year(1900) is False
assert is_leap_year(2000) is True
assert is_leap_year(2023) is False


def is_prime(n: int) -> bool:
    """Return True if n is a prime number.

    >>> is_prime(7)
    True
    >>> is_prime(9)
    False
    """
    return n > 1 and all(n % divisor for divisor in range(2, int(n**0.5) + 1))


assert is_prime(7) is True
assert is_prime(9) is False
assert is_prime(1) is False
assert is_prime(2) is True


def greatest_common_divisor(a: int, b: int) -> int:
    """Return the greatest number that divides both a and b.

    >>> greatest_common_divisor(12, 18)
    6
    """
    while b:
        a, b = b, a % b
    return a


assert greatest_common_divisor(12, 18) == 6
assert greatest_common_divisor(7, 5) == 1


def digits_sum(n: int) -> int:
    """Return the sum of the decimal digits of n, which is not negative.

    >>> digits_sum(123)
    6
    """
    return sum(int(digit) for digit in str(n))


assert digits_sum(123) == 6
assert digits_sum(0) == 0
assert digits_sum(999) == 27


def capitalize_words(text: str) -> str:
    """Return text with the first letter of every word in upper case; words are separated by one space.

    >>> capitalize_words("hello big world")
    'Hello Big World'
    """
    return " ".join(word[:1].upper() + word[1:] for word in text.split(" "))


assert capitalize_words("hello big world") == "Hello Big World"
assert capitalize_words("a") == "A"


def letter_counts(text: str) -> dict[str, int]:
    """Return how often each character occurs in text.

    >>> letter_counts("aba")
    {'a': 2, 'b': 1}
    """
    counts: dict[str, int] = {}
    for letter in text:
        counts[letter] = counts.get(letter, 0) + 1
    return counts


assert letter_counts("aba") == {"a": 2, "b": 1}
assert letter_counts("") == {}


def second_largest(numbers: list[int]) -> int:
    """Return the second largest of at least two different numbers.

    >>> second_largest([4, 1, 9])
    4
    """
    return sorted(numbers)[-2]


assert second_largest([4, 1, 9]) == 4
assert second_largest([2, 1]) == 1


def flatten(lists: list[list[int]]) -> list[int]:
    """Return the items of all lists in one list.

    >>> flatten([[1, 2], [3]])
    [1, 2, 3]
    """
    return [item for each in lists for item in each]


assert flatten([[1, 2], [3]]) == [1, 2, 3]
assert flatten([]) == []


def merge_sorted(a: list[int], b: list[int]) -> list[int]:
    """Return one sorted list of all items of the two sorted lists a and b.

    >>> merge_sorted([1, 4], [2, 3])
    [1, 2, 3, 4]
    """
    return sorted(a + b)


assert merge_sorted([1, 4], [2, 3]) == [1, 2, 3, 4]
assert merge_sorted([], [5]) == [5]


def binary(n: int) -> str:
    """Return n, which is not negative, in binary notation.

    >>> binary(5)
    '101'
    """
    return f"{n:b}"


assert binary(5) == "101"
assert binary(0) == "0"
assert binary(8) == "1000"


def starts_with(text: str, prefix: str) -> bool:
    """Return True if text begins with prefix.

    >>> starts_with("hello", "he")
    True
    """
    return text.startswith(prefix)


assert starts_with("hello", "he") is True
assert starts_with("hello", "lo") is False


def clamp(x: int, low: int, high: int) -> int:
    """Return x, but at least low and at most high.

    >>> clamp(15, 0, 10)
    10
    """
    return max(low, min(x, high))


assert clamp(15, 0, 10) == 10
assert clamp(-1, 0, 10) == 0
assert clamp(5, 0, 10) == 5


def invert(mapping: dict[str, int]) -> dict[int, str]:
    """Return a dictionary from the values of mapping to its keys; the values are all different.

    >>> invert({"a": 1})
    {1: 'a'}
    """
    return {value: key for key, value in mapping.items()}


assert invert({"a": 1, "b": 2}) == {1: "a", 2: "b"}
assert invert({}) == {}


def rotate(items: list[int], n: int) -> list[int]:
    """Move the first n items of the list to its end; n is at most the length of the list.

    >>> rotate([1, 2, 3, 4], 1)
    [2, 3, 4, 1]
    """
    return items[n:] + items[:n]


assert rotate([1, 2, 3, 4], 1) == [2, 3, 4, 1]
assert rotate([1, 2], 2) == [1, 2]
assert rotate([1, 2, 3], 0) == [1, 2, 3]


def running_total(numbers: list[int]) -> list[int]:
    """Return the sums of the first 1, 2, 3, ... numbers.

    >>> running_total([1, 2, 3])
    [1, 3, 6]
    """
    totals, total = [], 0
    for number in numbers:
        total += number
        totals.append(total)
    return totals


assert running_total([1, 2, 3]) == [1, 3, 6]
assert running_total([]) == []


def balanced(text: str) -> bool:
    """Return True if every opening parenthesis in text has a closing one after it, and the other way round.

    >>> balanced("(())()")
    True
    >>> balanced(")(")
    False
    """
    depth = 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            return False
    return depth == 0


assert balanced("(())()") is True
assert balanced(")(") is False
assert balanced("(") is False


def caesar(text: str, shift: int) -> str:
    """Replace every lower-case letter by the one shift places later in the alphabet, after z comes a.

    >>> caesar("xyz", 2)
    'zab'
    """
    return "".join(chr((ord(letter) - 97 + shift) % 26 + 97) if "a" <= letter <= "z" else letter for letter in text)


assert caesar("xyz", 2) == "zab"
assert caesar("a b", 1) == "b c"


def transpose(matrix: list[list[int]]) -> list[list[int]]:
    """Return the matrix with rows and columns exchanged.

    >>> transpose([[1, 2], [3, 4], [5, 6]])
    [[1, 3, 5], [2, 4, 6]]
    """
    return [list(column) for column in zip(*matrix, strict=True)]


assert transpose([[1, 2], [3, 4], [5, 6]]) == [[1, 3, 5], [2, 4, 6]]
assert transpose([[7]]) == [[7]]


def chunks(items: list[int], size: int) -> list[list[int]]:
    """Cut the list into lists of size items; the last one may be shorter.

    >>> chunks([1, 2, 3, 4, 5], 2)
    [[1, 2], [3, 4], [5]]
    """
    return [items[start : start + size] for start in range(0, len(items), size)]


assert chunks([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
assert chunks([], 3) == []


def common_prefix(a: str, b: str) -> str:
    """Return the longest text that both a and b begin with.

    >>> common_prefix("flower", "flow")
    'flow'
    """
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return a[:length]


assert common_prefix("flower", "flow") == "flow"
assert common_prefix("ab", "cd") == ""


def collatz_steps(n: int) -> int:
    """Count the steps from n to 1: an even number is halved, an odd one is multiplied by 3 and increased by 1.

    >>> collatz_steps(6)
    8
    """
    steps = 0
    while n != 1:
        n = n // 2 if n % 2 == 0 else 3 * n + 1
        steps += 1
    return steps


assert collatz_steps(6) == 8
assert collatz_steps(1) == 0


def get_path(data: dict[str, Any], path: str) -> Any:
    """Return what lies in nested dictionaries at a path of keys with dots between them, or None.

    >>> get_path({"a": {"b": 3}}, "a.b")
    3
    """
    found: Any = data
    for key in path.split("."):
        if not isinstance(found, dict) or key not in found:
            return None
        found = found[key]
    return found


assert get_path({"a": {"b": 3}}, "a.b") == 3
assert get_path({"a": 1}, "a.b") is None
assert get_path({"a": 1}, "c") is None


def average(numbers: list[float]) -> float:
    """Return the arithmetic mean of a list that is not empty.

    >>> average([1.0, 2.0, 6.0])
    3.0
    """
    return sum(numbers) / len(numbers)


assert average([1.0, 2.0, 6.0]) == 3.0
assert average([0.5]) == 0.5


def remove_vowels(text: str) -> str:
    """Return text without the letters a, e, i, o and u; text is in lower case.

    >>> remove_vowels("banana")
    'bnn'
    """
    return "".join(letter for letter in text if letter not in "aeiou")


assert remove_vowels("banana") == "bnn"
assert remove_vowels("sky") == "sky"


def count_true(values: list[bool]) -> int:
    """Return how many of the values are True."""
    return sum(values)


assert count_true([True, False, True]) == 2
assert count_true([]) == 0


def index_of(items: list[str], wanted: str) -> int:
    """Return the first place of wanted in the list, or -1 if it is not there.

    >>> index_of(["a", "b"], "b")
    1
    """
    return items.index(wanted) if wanted in items else -1


assert index_of(["a", "b"], "b") == 1
assert index_of(["a"], "z") == -1


def absolute_difference(a: int, b: int) -> int:
    """Return by how much a and b differ, as a number that is not negative."""
    return abs(a - b)


assert absolute_difference(3, 8) == 5
assert absolute_difference(8, 3) == 5


def repeat_text(text: str, n: int, separator: str) -> str:
    """Return text n times, with separator between.

    >>> repeat_text("ab", 3, "-")
    'ab-ab-ab'
    """
    return separator.join([text] * n)


assert repeat_text("ab", 3, "-") == "ab-ab-ab"
assert repeat_text("x", 1, "-") == "x"


def squares_up_to(n: int) -> list[int]:
    """Return the squares of the numbers from 1 to n.

    >>> squares_up_to(3)
    [1, 4, 9]
    """
    return [number * number for number in range(1, n + 1)]


assert squares_up_to(3) == [1, 4, 9]
assert squares_up_to(0) == []


def last_digit(n: int) -> int:
    """Return the last decimal digit of n, which is not negative."""
    return n % 10


assert last_digit(123) == 3
assert last_digit(40) == 0


def are_anagrams(a: str, b: str) -> bool:
    """Return True if a and b have the same letters, each as often.

    >>> are_anagrams("listen", "silent")
    True
    """
    return sorted(a) == sorted(b)


assert are_anagrams("listen", "silent") is True
assert are_anagrams("aab", "abb") is False


def product(numbers: list[int]) -> int:
    """Return all numbers of the list multiplied; 1 for an empty list.

    >>> product([2, 3, 4])
    24
    """
    result = 1
    for number in numbers:
        result *= number
    return result


assert product([2, 3, 4]) == 24
assert product([]) == 1


def every_second(items: list[int]) -> list[int]:
    """Return the first, third, fifth ... item of the list.

    >>> every_second([1, 2, 3, 4, 5])
    [1, 3, 5]
    """
    return items[::2]


assert every_second([1, 2, 3, 4, 5]) == [1, 3, 5]
assert every_second([]) == []


def initials(name: str) -> str:
    """Return the first letters of the words of name, in upper case.

    >>> initials("ada king lovelace")
    'AKL'
    """
    return "".join(word[0].upper() for word in name.split())


assert initials("ada king lovelace") == "AKL"
assert initials("plato") == "P"


def common_items(a: list[int], b: list[int]) -> list[int]:
    """Return the items of a that are in b too, in the order of a.

    >>> common_items([3, 1, 2], [2, 3])
    [3, 2]
    """
    return [item for item in a if item in b]


assert common_items([3, 1, 2], [2, 3]) == [3, 2]
assert common_items([1], []) == []


def seconds_to_clock(seconds: int) -> str:
    """Return seconds as minutes and seconds, the latter with two digits.

    >>> seconds_to_clock(125)
    '2:05'
    """
    return f"{seconds // 60}:{seconds % 60:02d}"


assert seconds_to_clock(125) == "2:05"
assert seconds_to_clock(59) == "0:59"


def smallest_index(numbers: list[int]) -> int:
    """Return the place of the smallest number of a list that is not empty; of equal ones, the first.

    >>> smallest_index([4, 1, 3, 1])
    1
    """
    return numbers.index(min(numbers))


assert smallest_index([4, 1, 3, 1]) == 1
assert smallest_index([7]) == 0


def add_to_all(numbers: list[int], amount: int) -> list[int]:
    """Return a list with amount added to every number.

    >>> add_to_all([1, 2], 10)
    [11, 12]
    """
    return [number + amount for number in numbers]


assert add_to_all([1, 2], 10) == [11, 12]
assert add_to_all([], 3) == []


def is_sorted(numbers: list[int]) -> bool:
    """Return True if no number of the list is less than the one before it.

    >>> is_sorted([1, 2, 2])
    True
    """
    return numbers == sorted(numbers)


assert is_sorted([1, 2, 2]) is True
assert is_sorted([2, 1]) is False


def replace_spaces(text: str) -> str:
    """Return text with every space replaced by an underscore.

    >>> replace_spaces("a b c")
    'a_b_c'
    """
    return text.replace(" ", "_")


assert replace_spaces("a b c") == "a_b_c"
assert replace_spaces("abc") == "abc"


def triangle_number(n: int) -> int:
    """Return the sum of the numbers from 1 to n.

    >>> triangle_number(4)
    10
    """
    return n * (n + 1) // 2


assert triangle_number(4) == 10
assert triangle_number(0) == 0


def total_price(prices: dict[str, int], items: list[str]) -> int:
    """Return the sum of the prices of all items, each as often as it is in the list.

    >>> total_price({"pen": 2, "book": 5}, ["pen", "pen", "book"])
    9
    """
    return sum(prices[item] for item in items)


assert total_price({"pen": 2, "book": 5}, ["pen", "pen", "book"]) == 9
assert total_price({}, []) == 0
