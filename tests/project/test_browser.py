"""The browser of the tests: what a page complains of is seen, and a page that is right is not blamed."""

import asyncio

import pytest

HEAD = "<!DOCTYPE html><meta charset='utf-8'><title>t</title>"
POLICY = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; script-src 'unsafe-inline'\">"
DOT = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("<script>console.error('broken')</script>", "console error: broken"),
        ("<script>console.warn('odd')</script>", "console warning: odd"),
        ("<script>null.x</script>", "exception: Cannot read"),
        ("<script>Promise.reject(new Error('late'))</script>", "exception: late"),
        ("<img src='http://example.invalid/a.png'>", "request: http://example.invalid/a.png"),
        ("<script>fetch('http://example.invalid/a').catch(() => {})</script>", "request: http://example.invalid/a"),
        ("<img src='beside.png'>", "request: file:///"),
        (POLICY + f"<img src='{DOT}'>", "console error: "),
    ],
    ids=["error", "warning", "exception", "promise", "image", "fetch", "file", "policy"],
)
def test_what_a_page_complains_of_is_seen(browse, body, problem):
    page = browse(HEAD + body)
    page.wait_for_timeout(50)  # a promise's rejection comes after the load
    browse.close()
    assert any(found.startswith(problem) for found in browse.problems), browse.problems
    browse.problems.clear()


def test_a_page_that_is_right_is_not_blamed(browse):
    page = browse(HEAD + f"<img src='{DOT}'><script>document.body.dataset.width = innerWidth</script>", width=500)
    assert page.evaluate("document.images[0].naturalWidth") == 1
    assert page.get_attribute("body", "data-width") == "500"
    assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") is False
    assert browse(HEAD, dark=True).evaluate("matchMedia('(prefers-color-scheme: dark)').matches")


def test_after_a_test_of_a_page_others_may_have_an_event_loop():
    async def nothing() -> int:
        return 3

    assert asyncio.run(nothing()) == 3
